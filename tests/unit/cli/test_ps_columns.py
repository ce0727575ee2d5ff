"""What `brim ps` says of a model's place in memory."""

from typing import Any

import msgspec
import pytest
from support.scripted import make_plan

from brim.cli.ps import _kv_tokens, _leaves, _print_models, _requests, _shown, _state
from brim.cli.state import ServerState
from brim.runtime.api import ModelState, ModelStatus


def status(**fields: Any) -> ModelStatus:
    plain = ModelStatus(name="small", state=ModelState.READY, plan=make_plan())
    return msgspec.structs.replace(plain, **fields)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "ready"),
        ({"state": ModelState.STARTING, "load_progress": 0.0}, "starting 0 %"),
        (
            {"state": ModelState.STARTING, "load_progress": 0.43, "load_eta_s": 12.4},
            "starting 43 %, 12 s left",
        ),
    ],
)
def test_a_load_shows_how_far_it_is(fields: dict[str, Any], expected: str) -> None:
    """In percent, and the time left where there is progress to tell it by."""
    assert _state(status(**fields)) == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "-"),
        ({"leaves_in_s": 42.0}, "in 42 s"),
        ({"stays": "pinned by an app"}, "stays: pinned by an app"),
    ],
)
def test_a_model_says_when_it_leaves_or_why_it_stays(fields: dict[str, Any], expected: str) -> None:
    """One that is out of memory says neither."""
    assert _leaves(status(**fields)) == expected


@pytest.mark.parametrize(
    ("pool_tokens", "expected"),
    [(0, "-"), (16384, "100 of 16384"), (4096, "100 of 4096 (16384 planned)")],
)
def test_a_pool_that_was_made_smaller_says_what_was_planned(
    pool_tokens: int, expected: str
) -> None:
    """Cells in use, of those that there are."""
    assert _kv_tokens(status(kv_used_tokens=100, kv_pool_tokens=pool_tokens)) == expected


def test_requests_that_wait_for_the_queue_and_for_the_load_are_told_apart() -> None:
    """The former have been admitted."""
    assert _requests(status(num_running=2)) == "2"
    assert _requests(status(num_running=2, num_waiting=1)) == "2 (+1)"
    assert _requests(status(num_waiting_load=3)) == "0 (3 for its load)"


def test_every_row_has_a_cell_for_each_column(capsys: pytest.CaptureFixture[str]) -> None:
    """Planned, granted and measured footprints stand side by side."""
    _print_models([status(resident_bytes=2**30, idle_s=5.0)])
    head, row = (line.split("  ") for line in capsys.readouterr().out.splitlines())
    cells = dict(zip(filter(None, head), filter(None, row), strict=True))
    found = {name.strip(): cell.strip() for name, cell in cells.items()}
    assert found["planned"] == "0 MiB"
    assert (found["granted"], found["measured"]) == ("-", "1.00 GiB")
    assert (found["idle"], found["leaves"]) == ("5 s", "-")


def test_the_operators_token_is_not_printed() -> None:
    """Output is pasted where others read it."""
    server = ServerState(
        pid=1,
        started_unix_s=0.0,
        host="127.0.0.1",
        port=2746,
        drain_limit_s=30.0,
        operator_token="secret",
    )
    assert "secret" not in str(_shown(server))
    assert _shown(server)["port"] == 2746
