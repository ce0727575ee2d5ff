"""Events are lines that a person and a program can read."""

import io
import re
import sys

import pytest

from brim.telemetry.events import log_event, relay_event


def test_an_event_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Time, name and fields stand on one line; None is left out, and text is quoted if need be."""
    log_event("worker_died", model="demo", pid=42, code=None, backoff_s=0.5, reason="a\nb = c")
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(
        r'\S+Z worker_died model=demo pid=42 backoff_s=0.500 reason="a\\nb = c"\n', err
    )


def test_a_closed_stderr_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """An event that cannot be written is dropped instead of ending the server."""
    stream = io.StringIO()
    stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    log_event("worker_died")


@pytest.mark.parametrize(
    ("line", "is_event"),
    [
        ("2026-11-21T14:02:11Z worker_died model=demo", True),
        ("2026-11-21T14:02:11Z worker_died", True),
        ("2026-11-21T14:02:11Z Traceback follows", False),
        ("GGML_ASSERT(n <= 4) failed at 2026-11-21T14:02:11Z worker_died", False),
        ("", False),
    ],
)
def test_events_of_other_processes_alone_are_relayed(
    capsys: pytest.CaptureFixture[str], line: str, is_event: bool
) -> None:
    """What a backend prints stays with its process; an event goes to our own stderr as it is."""
    assert relay_event(line) is is_event
    assert capsys.readouterr().err == (f"{line}\n" if is_event else "")
