"""The store of forecast errors: kept, bounded, shared, and never in anybody's way."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from brim.ledger import history
from brim.ledger.correction import PastErrors
from brim.ledger.history import ForecastError, ForecastHistory, Subject

SUBJECT = Subject("fingerprint", "llamacpp", "this machine")
OTHER = Subject("fingerprint", "llamacpp", "another machine")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "forecasts.sqlite"


@pytest.fixture
def store(path: Path) -> Iterator[ForecastHistory]:
    store = ForecastHistory(path, now=lambda: 1.0)
    yield store
    store.close()


def test_ratios_come_newest_first_by_term_and_subject(store: ForecastHistory) -> None:
    """What was kept of a model on a machine comes back for it alone, from any process."""
    store.record(SUBJECT, "load 1", {"kv_bytes": (100, 110), "weights_bytes": (50, 50)})
    store.record(SUBJECT, "load 2", {"kv_bytes": (100, 90)})
    store.record(OTHER, "load 3", {"kv_bytes": (1, 2)})
    expected = PastErrors(ratios={"kv_bytes": (0.9, 1.1), "weights_bytes": (1.0,)})
    assert store.past_errors(SUBJECT) == expected
    store.close()
    assert store.past_errors(SUBJECT) == expected, "the file has it"


def test_a_term_measured_again_is_replaced(store: ForecastHistory) -> None:
    """A peak that grew is one measurement of one load."""
    store.record(SUBJECT, "load", {"total_bytes": (100, 110)})
    store.record(SUBJECT, "load", {"total_bytes": (100, 130)})
    assert store.past_errors(SUBJECT).ratios == {"total_bytes": (1.3,)}


def test_an_error_is_a_percentage_of_what_was_measured() -> None:
    """Too much planned is above zero, too little below; nothing measured gives none."""
    pairs = [(103, 100), (90, 100), (5, 0)]
    errors = [ForecastError.of("kv_bytes", *pair).error_percent for pair in pairs]
    assert errors == [3.0, -10.0, None]


def test_refusals_since_the_last_measurement_are_counted(store: ForecastHistory) -> None:
    """A measurement begins the count anew."""
    store.record_refusal(SUBJECT, "1")
    store.record(SUBJECT, "2", {"kv_bytes": (1, 1)})
    assert store.past_errors(SUBJECT).num_refused == 0
    for number in (3, 4):
        store.record_refusal(SUBJECT, str(number))
    assert store.past_errors(SUBJECT).num_refused == 2


def test_nothing_planned_or_measured_is_no_ratio(store: ForecastHistory) -> None:
    """A term of zero bytes says nothing of the forecast."""
    store.record(SUBJECT, "1", {"kv_bytes": (0, 5), "weights_bytes": (5, 0)})
    assert store.past_errors(SUBJECT) == PastErrors()


def test_old_loads_and_old_rows_are_forgotten(
    store: ForecastHistory, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model keeps its newest loads, the file its newest rows."""
    monkeypatch.setattr(history, "LOADS_PER_MODEL", 3)
    monkeypatch.setattr(history, "MAX_ROWS", 5)
    for number in range(1, 6):
        store.record(SUBJECT, f"a{number}", {"kv_bytes": (100, 100 + number)})
    assert store.past_errors(SUBJECT).ratios == {"kv_bytes": (1.05, 1.04, 1.03)}
    for number in range(1, 6):
        store.record(OTHER, f"b{number}", {"kv_bytes": (100, 100)})
    assert store.past_errors(SUBJECT) == PastErrors()
    with sqlite3.connect(path) as connection:
        [count] = connection.execute("SELECT count(*) FROM forecast").fetchone()
    connection.close()
    assert count == 3


@pytest.mark.parametrize(
    "damage", [b"no database at all" * 100, b"SQLite format 3\0" + b"x" * 5000]
)
def test_a_damaged_file_is_put_aside_and_begun_anew(
    store: ForecastHistory, path: Path, damage: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    """Recording goes on in a new file, the old one is kept, and one line says so."""
    path.parent.mkdir()
    path.write_bytes(damage)
    store.record(SUBJECT, "1", {"kv_bytes": (100, 110)})
    assert store.past_errors(SUBJECT).ratios == {"kv_bytes": (1.1,)}
    assert path.with_name(path.name + ".damaged").read_bytes() == damage
    assert store.num_failures == 1
    assert capsys.readouterr().err.count("forecast_history_failed") == 1


def test_a_file_of_another_schema_is_put_aside(store: ForecastHistory, path: Path) -> None:
    """A table without our columns is a foreign file."""
    path.parent.mkdir()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE forecast (id INTEGER PRIMARY KEY)")
    connection.close()
    store.record(SUBJECT, "1", {"kv_bytes": (100, 110)})
    assert store.past_errors(SUBJECT).ratios == {"kv_bytes": (1.1,)}


def test_rows_that_somebody_else_wrote_are_left_out(store: ForecastHistory, path: Path) -> None:
    """SQLite keeps words in a column of integers; such a row teaches nothing and harms nobody."""
    store.record(SUBJECT, "1", {"kv_bytes": (100, 110), "weights_bytes": (100, 100)})
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE forecast SET measured_bytes = 'many' WHERE term = 'kv_bytes'")
    connection.close()
    assert store.past_errors(SUBJECT).ratios == {"weights_bytes": (1.0,)}


def test_a_place_that_cannot_be_written_costs_the_history_alone(tmp_path: Path) -> None:
    """Nothing is raised: nothing is known, and that is counted."""
    (tmp_path / "file").write_text("")
    store = ForecastHistory(tmp_path / "file" / "forecasts.sqlite")
    store.record(SUBJECT, "1", {"kv_bytes": (100, 110)})
    assert store.past_errors(SUBJECT) == PastErrors()
    assert store.num_failures == 2


def test_two_processes_write_into_one_file(store: ForecastHistory, path: Path) -> None:
    """Servers side by side add to one history."""
    second = ForecastHistory(path)
    store.record(SUBJECT, "1", {"kv_bytes": (100, 110)})
    second.record(SUBJECT, "2", {"kv_bytes": (100, 120)})
    assert store.past_errors(SUBJECT).ratios == {"kv_bytes": (1.2, 1.1)}
    second.close()
