"""`brim events`: what a state directory keeps, for people and for programs."""

import json
import re
from pathlib import Path

import pytest

from brim.cli import events
from brim.cli.app import main
from brim.core.event import Event, EventKind
from brim.telemetry.event_store import EventStore

GIB = 2**30
SHRUNK = Event(
    at_unix_s=1795312979.5,
    kind=EventKind.KV_SHRUNK,
    cause="the system reports warning pressure",
    model="qwen-4b",
    before_bytes=3 * GIB,
    after_bytes=2 * GIB,
    took_s=0.234,
    is_simulated=True,
)
LOADED = Event(at_unix_s=1795312929.0, kind=EventKind.MODEL_LOADED, model="qwen-4b")
TIGHT = Event(at_unix_s=1795312990.0, kind=EventKind.BUDGET_TIGHTENING, app="mail")
SAVING = Event(
    at_unix_s=1795312991.0, kind=EventKind.STANCE_CHANGED, before_watts=18.24, after_watts=11.0
)


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state directory with four events, named in the environment."""
    path = tmp_path / "state"
    store = EventStore(path / "events.sqlite")
    for event in (LOADED, SHRUNK, TIGHT, SAVING):
        store.record(event)
    store.close()
    monkeypatch.setenv("BRIM_SERVER_STATE_DIRECTORY", str(path))
    return path


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert main(["events", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.usefixtures("directory")
def test_each_event_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    """When, what, whose, the figures before and after, how long and why; simulated ones say so."""
    lines = answer(capsys)
    assert re.split(r"  +", lines[0]) == ["when", "what", "model", "before -> after", "s", "why"]
    cells = [re.split(r"  +", line)[1:] for line in lines[1:]]
    assert cells == [
        ["model loaded", "qwen-4b", "-", "-", "-"],
        ["kv shrunk (simulated)", "qwen-4b", "3.00 GiB -> 2.00 GiB", "0.23", SHRUNK.cause],
        ["budget tightening", "app mail", "-", "-", "-"],
        ["stance changed", "-", "18.2 W -> 11.0 W", "-", "-"],
    ]
    assert re.match(r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d  model loaded", lines[1])


@pytest.mark.usefixtures("directory")
def test_programs_get_the_events_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    """JSON is a list of events, with the words and units of the event stream."""
    found = json.loads("".join(answer(capsys, "--json", "--model", "qwen-4b")))
    assert [event["kind"] for event in found] == ["model loaded", "kv shrunk"]
    assert found[1]["before_bytes"] == 3 * GIB
    assert "after_bytes" not in found[0]


@pytest.mark.usefixtures("directory")
@pytest.mark.parametrize(
    ("arguments", "kinds"),
    [
        (["--limit", "2"], ["budget tightening", "stance changed"]),
        (["--limit", "0"], []),
        (["--kind", "kv-shrunk", "--kind", "Model_Loaded"], ["model loaded", "kv shrunk"]),
        (["--app", "mail"], ["budget tightening"]),
        (["--app", "mail", "--model", "qwen-4b"], []),
    ],
)
def test_lists_are_narrowed(
    capsys: pytest.CaptureFixture[str], arguments: list[str], kinds: list[str]
) -> None:
    """The newest, of some kinds, of one model or of one app are listed, oldest first."""
    found = json.loads("".join(answer(capsys, "--json", *arguments)))
    assert [event["kind"] for event in found] == kinds


def test_a_directory_can_be_named(capsys: pytest.CaptureFixture[str], directory: Path) -> None:
    """--state-dir comes before the setting, and one without events says that it has none."""
    elsewhere = directory.parent / "elsewhere"
    assert answer(capsys, "--state-dir", str(elsewhere), "--json") == ["[]"]
    assert main(["events", "--state-dir", str(elsewhere)]) == 0
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"brim: {elsewhere} keeps no event yet\n")
    assert not elsewhere.exists()


@pytest.mark.usefixtures("directory")
@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--kind", "kv-shrank"], 2, "there is no kind 'kv-shrank'; did you mean 'kv shrunk'?"),
        (["--kind", "zzz"], 2, "there is no kind 'zzz'; there are stance changed"),
        (["--limit", "-1"], 2, "'--limit'"),
        (["--port", "7", "--state-dir", "x"], 2, "leave one out"),
        (["--port", "7"], 1, "no server is running on port 7"),
    ],
)
def test_wrong_questions_are_one_sentence(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str
) -> None:
    """Bad usage is 2 and a server that is not there is 1, each with what to do."""
    assert main(["events", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.count("\n") == 1


def test_a_damaged_file_is_one_sentence(
    capsys: pytest.CaptureFixture[str], directory: Path
) -> None:
    """A file that is no database is an error that names it."""
    (directory / "events.sqlite").write_bytes(b"no database" * 1000)
    assert main(["events"]) == 1
    assert "events.sqlite cannot be read" in capsys.readouterr().err


class Ended(Exception):
    """In place of a reader who has seen enough."""


def test_following_shows_what_comes(
    capsys: pytest.CaptureFixture[str], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the newest events those of any server on the directory follow, once each."""
    coming = [[LOADED], [], [TIGHT, SAVING]]

    def wait(seconds: float) -> None:
        if not coming:
            raise Ended
        store = EventStore(directory / "events.sqlite")
        for event in coming.pop(0):
            store.record(event)
        store.close()

    monkeypatch.setattr(events, "_wait", wait)
    for arguments, first in ((["--limit", "1"], ["stance changed"]), (["--limit", "0"], [])):
        coming[:] = [[LOADED], [], [TIGHT, SAVING]]
        assert main(["events", "--follow", "--json", *arguments]) == 1
        found = [json.loads(line)["kind"] for line in capsys.readouterr().out.splitlines()]
        assert found == [*first, "model loaded", "budget tightening", "stance changed"]


def test_following_is_readable(
    capsys: pytest.CaptureFixture[str], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines stand below their heads where they fit, and hold no terminal codes."""
    store = EventStore(directory / "events.sqlite")
    store.record(Event(at_unix_s=0, kind=EventKind.WORKER_DIED, model="m", cause="a\x1b[31m\nb"))
    store.close()

    def wait(seconds: float) -> None:
        raise Ended

    monkeypatch.setattr(events, "_wait", wait)
    assert main(["events", "-f", "--limit", "1"]) == 1
    head, line = capsys.readouterr().out.splitlines()
    assert line.index("worker died") == head.index("what")
    assert line.index("a?[31m?b") == head.index("why")
