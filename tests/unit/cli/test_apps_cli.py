"""`brim apps`: adding, changing and removing apps, and what they used, as tables and as JSON."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from support.scripted import make_plan

from brim.apps.day import day_of, days_before
from brim.apps.registry import Registry
from brim.apps.usage import Reservation, Spent, UsageStore
from brim.cli import app_warnings
from brim.cli.app import main
from brim.cli.state import write_state
from brim.core.app import App, Pair
from brim.core.machine import MachineSpec
from brim.errors import ConfigError
from brim.runtime.api import ModelState, ModelStatus

MAIL = """
name = "mail"
priority = "background"
models = ["toy"]

[budgets]
tokens_per_day = 2000
"""


REAL_NAMES = app_warnings._at_hand

SMALL = MachineSpec(name="x", system="linux", ram_bytes=8 * 10**9, others_bytes=3 * 10**9)


NOON = 1_800_014_400.0
"""Of a day in 2027: no test meets midnight, when budgets are renewed."""


class Noon:
    """The module `time` of what tells today's usage."""

    @staticmethod
    def time() -> float:
        return NOON


class Silent:
    """Energy counters of a machine that has none."""

    source = "no counters here"

    def read_uj(self) -> dict[str, int]:
        return {}


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The state directory that the settings name; the machine has one model and little else."""
    monkeypatch.setenv("BRIM_SERVER_STATE_DIRECTORY", str(tmp_path / "state"))
    monkeypatch.setattr("brim.machine.reading.read_machine", lambda: SMALL)
    monkeypatch.setattr("brim.machine.energy.counters_at_hand", Silent)
    monkeypatch.setattr("brim.cli.app_warnings._at_hand", lambda: {"toy"})
    monkeypatch.setattr("brim.cli.app_usage.time", Noon)
    return tmp_path / "state"


@pytest.fixture
def manifest(tmp_path: Path) -> str:
    path = tmp_path / "mail.toml"
    path.write_text(MAIL)
    return str(path)


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> tuple[str, str]:
    assert main(["apps", *words]) == code
    captured = capsys.readouterr()
    return captured.out, captured.err


def asked(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    return json.loads(said(capsys, *words, "--json")[0])


def known(state: Path, key: str) -> App | None:
    """Whose key it is."""
    with contextlib.closing(Registry(state / "apps.sqlite")) as apps:
        return apps.authenticate(key)


def add(capsys: pytest.CaptureFixture[str], manifest: str) -> str:
    """Adds the app; its key."""
    return str(asked(capsys, "add", manifest)["key"])


def test_the_key_is_printed_once(
    manifest: str, state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the line that clients need; no other command and no file has it."""
    lines = said(capsys, "add", manifest)[0].splitlines()
    url, key = lines[-1].split()
    assert url == "OPENAI_BASE_URL=http://127.0.0.1:2746/v1"
    key = key.removeprefix("OPENAI_API_KEY=")
    found = known(state, key)
    assert found is not None
    assert found.name == "mail"
    for words in (["list"], ["show", "mail"], ["usage"]):
        for form in ([], ["--json"]):
            assert key not in "".join(said(capsys, *words, *form))


@pytest.mark.parametrize("place", ["app_warnings.warnings_for", "apps._base_url"])
def test_no_key_is_made_where_it_could_not_be_shown(
    manifest: str,
    state: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    """A machine that cannot be read costs neither a new app's key nor an old one's."""
    key = add(capsys, manifest)

    def fails(_: object) -> None:
        raise ConfigError("it cannot be read")

    monkeypatch.setattr(f"brim.cli.{place}", fails)
    Path(manifest).write_text('name = "new"')
    assert "it cannot be read" in said(capsys, "add", manifest, code=1)[1]
    assert [each["app"]["name"] for each in asked(capsys, "list")] == ["mail"]
    if place == "apps._base_url":
        said(capsys, "rotate", "mail", code=1)
    assert known(state, key) is not None


def test_adding_twice_replaces_nothing(
    manifest: str, state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second is refused; with --replace the manifest is new and the key is not."""
    key = add(capsys, manifest)
    assert "--replace" in said(capsys, "add", manifest, code=1)[1]
    Path(manifest).write_text(MAIL.replace("2000", "3000"))
    assert asked(capsys, "add", manifest, "--replace")["key"] is None
    app = known(state, key)
    assert app is not None
    assert app.budgets.tokens == 3000
    assert "its key and usage stay" in said(capsys, "add", manifest, "--replace")[0]


def test_replacing_an_app_that_is_not_there_adds_it(
    manifest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """So that one command line can be run again."""
    assert asked(capsys, "add", manifest, "--replace")["key"].startswith("brim-")


def test_a_wrong_manifest_is_one_sentence(
    manifest: str, state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On stderr, with exit code 1, and nothing is added."""
    Path(manifest).write_text(MAIL + "mlock = true\n")
    for command in ("add", "check"):
        out, err = said(capsys, command, manifest, code=1)
        assert out == ""
        assert err.count("\n") == 1
        assert f"{manifest}: [budgets] an app cannot set 'mlock': memory that" in err
    assert not state.exists()


def test_check_adds_nothing(manifest: str, state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says what the app would be granted."""
    assert said(capsys, "check", manifest)[0] == (
        "the manifest of 'mail' is in order: background; models toy; 2,000 tokens a day\n"
    )
    assert asked(capsys, "check", manifest)["app"]["budgets"]["tokens"] == 2000
    assert not state.exists()


def test_a_list_of_no_apps_says_how_to_add_one(capsys: pytest.CaptureFixture[str]) -> None:
    """People get a sentence in place of an empty table."""
    assert said(capsys, "list") == (
        "", "brim: no app is known yet; add one with: brim apps add FILE\n"
    )  # fmt: skip


def test_list_and_show(manifest: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every app with its part of the budget, and one with its manifest as it was written."""
    assert asked(capsys, "list") == []
    key = add(capsys, manifest)
    head, row = said(capsys, "list")[0].splitlines()
    assert head.split()[:3] == ["app", "priority", "models"]
    assert row.split()[:3] == ["mail", "background", "toy"]
    assert "0 of 2,000, 0 %" in row
    assert row.endswith(f"{key[:13]}...")
    assert asked(capsys, "list")[0]["today"]["budget_tokens"] == 2000
    assert MAIL.strip() in said(capsys, "show", "mail")[0]
    assert asked(capsys, "show", "mail")["manifest"] == MAIL


def test_a_manifest_does_not_drive_the_terminal(
    manifest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Control characters in someone else's file are shown as question marks."""
    Path(manifest).write_text(MAIL + "# na\u00efve \x9b31m\n")
    add(capsys, manifest)
    out = said(capsys, "show", "mail")[0]
    assert "na\u00efve ?31m" in out


def test_rotate_and_remove(manifest: str, state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A new key ends the old one; a removed app has none."""
    old = add(capsys, manifest)
    new = asked(capsys, "rotate", "mail")["key"]
    assert (known(state, old), known(state, new) is None) == (None, False)
    assert "OPENAI_API_KEY=brim-" in said(capsys, "rotate", "mail")[0]
    assert asked(capsys, "remove", "mail") == {"name": "mail", "is_removed": True}
    assert asked(capsys, "list") == []


@pytest.mark.parametrize("command", ["show", "remove", "rotate", "usage"])
def test_unknown_apps_are_named(
    command: str, manifest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An app that does not exist is a sentence with those that do."""
    add(capsys, manifest)
    assert "there is no app 'chat'; there are: 'mail'" in said(capsys, command, "chat", code=1)[1]


def use(state: Path) -> None:
    """Half of today's budget, something yesterday, something long ago, and a request in work."""
    today = day_of(NOON)
    store = UsageStore(state / "usage.sqlite", now=Noon.time)
    for days, tokens in ((0, 900), (1, 7), (30, 5)):
        reservation = Reservation(
            app="mail",
            day=days_before(today, days),
            model="toy",
            num_prompt_tokens=100,
            max_completion_tokens=2000,
        )
        spent = Spent(num_requests=1, num_prompt_tokens=100, num_completion_tokens=tokens)
        store.end(store.begin(reservation), reservation, spent)
    store.note("mail", today, Spent(num_refused=3, energy_j=1800.0))
    store.begin(
        Reservation(
            app="mail", day=today, model="toy", num_prompt_tokens=100, max_completion_tokens=50
        )
    )
    store.close()


def test_usage_against_the_budget(
    manifest: str, state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Used, promised and left today with the percentage and when it renews; days below."""
    add(capsys, manifest)
    use(state)
    lines = said(capsys, "usage")[0].splitlines()
    assert "1,000 of 2,000, 50 %" in lines[1]
    assert lines[1].split()[:3] == ["mail", "1", "3"]
    assert "150" in lines[1].split()
    assert "0.50" in lines[1].split()
    assert "budgets renew in" in lines[2]
    assert [line.split()[1:3] for line in lines[5:]] == [
        ["mail", "-"], ["mail", "toy"], ["mail", "toy"],
    ]  # fmt: skip
    assert len(said(capsys, "usage", "mail", "--days", "31")[0].splitlines()) == len(lines) + 1
    found = asked(capsys, "usage", "mail")
    assert found["today"][0]["reserved_tokens"] == 150
    assert [day["num_tokens"] for day in found["days"]] == [0, 1000, 107]


def test_usage_outlives_the_app(
    manifest: str, state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a removed app used stays on record, and counts if it comes back."""
    add(capsys, manifest)
    use(state)
    said(capsys, "remove", "mail")
    found = asked(capsys, "usage", "mail")
    assert found["today"] == []
    assert len(found["days"]) == 3
    add(capsys, manifest)
    assert asked(capsys, "usage", "mail")["today"][0]["used_tokens"] == 1000


def test_another_state_directory_is_pointed_out(
    manifest: str, tmp_path: Path, state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the running server keeps its apps elsewhere; --state-dir names it."""
    other = tmp_path / "other"
    write_state("127.0.0.1", 4321, 1.0, directory=other)
    assert f"--state-dir {other}" in said(capsys, "list")[1]
    out, err = said(capsys, "add", manifest, "--state-dir", str(other))
    assert err == ""
    assert "OPENAI_BASE_URL=http://127.0.0.1:4321/v1 " in out
    assert (other / "apps.sqlite").exists()
    assert not state.exists()


def test_damage_is_a_sentence(
    manifest: str, state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1 and what to do; the file stays as it is."""
    state.mkdir()
    (state / "apps.sqlite").write_bytes(b"x" * 4096)
    _, err = said(capsys, "add", manifest, code=1)
    assert "put a copy from a backup in its place" in err
    assert (state / "apps.sqlite").read_bytes() == b"x" * 4096


WANTING = """
name = "mail"
models = ["toy", "none"]
[requires]
memory_gb = 5.5
[budgets]
energy_wh_per_day = 1.0
"""


def test_what_the_machine_lacks_is_said(manifest: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Memory over the budget, energy that nobody measures, unknown names; all of it is added."""
    Path(manifest).write_text(WANTING)
    found = asked(capsys, "add", manifest)["warnings"]
    assert found == [
        "'mail' requires 5.5 GB for its models, and this machine has 4.0 GB to give now "
        "(ram minus others and reserve): close other programs, or give it smaller models",
        "the energy budget of 'mail' will not be kept: this machine does not say what energy is "
        "used (no counters here)",
        "'mail' may use 'none', and no model of this machine has that name; the name is what "
        "clients see: brim serve -m none=REFERENCE",
    ]
    err = said(capsys, "check", manifest)[1]
    assert err.splitlines() == [f"brim: {warning}" for warning in found]
    Path(manifest).write_text(MAIL)
    assert said(capsys, "check", manifest)[1] == ""


@pytest.mark.usefixtures("state")
def test_what_servers_hold_for_models_is_there_for_an_app(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of a model that is loaded already is not missing for its app."""
    app = App(name="a", required_bytes=int(5.5e9))
    plan = make_plan()
    model = ModelStatus(name="m", state=ModelState.READY, plan=plan, resident_bytes=int(1e9))
    monkeypatch.setattr(app_warnings, "_statuses", lambda: [model])
    assert "has 5.0 GB to give now" in app_warnings._about_memory(app)[0]
    monkeypatch.setattr(app_warnings, "_statuses", lambda: [model, model])
    assert app_warnings._about_memory(app) == []


def test_names_are_held_against_the_running_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """What counts is what it serves, not what lies on the disk."""
    monkeypatch.setattr(app_warnings, "_served", lambda: {"other", "more"})
    assert app_warnings._about_models(App(name="a", models=("toy", "more"))) == [
        "'a' may use 'toy', which the running server does not serve; it serves: more, other"
    ]
    assert app_warnings._about_models(App(name="a")) == []


def test_pairs_are_held_against_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pair that the server would load as two models is said, with the setting that joins it."""
    app = App(name="a", models=("x", "y"), pairs=(Pair(target="x", draft="y"),))
    assert app_warnings._about_pairs(app) == [
        "'x' and 'y' are a pair to 'a', and the settings do not load them as one: set "
        'models.pairs = ["x+y"]'
    ]
    monkeypatch.setenv("BRIM_MODELS_PAIRS", "other+one,x+y")
    assert app_warnings._about_pairs(app) == []


def test_there_is_a_demo_at_hand() -> None:
    """The names are those that `brim serve` gives where it is not told another."""
    assert "demo" in REAL_NAMES()
