"""State that another version of brim wrote: older files are used, newer ones left alone.

What apps and events keep is tested beside them.
"""

import os
import sqlite3
import stat
import struct
from pathlib import Path

import msgspec
import pytest
from support.prefixes import Clock, Filler, ids, open_store

from brim.cli.state import ServerState, one_server
from brim.ledger.book import Book
from brim.ledger.history import FORMAT_VERSION, ForecastHistory, Subject
from brim.ledger.processes import start_time

SUBJECT = Subject("fingerprint", "llamacpp", "this machine")

# As brim wrote it before its files had versions.
FIRST_SCHEMA = """
CREATE TABLE IF NOT EXISTS forecast (
    id INTEGER PRIMARY KEY,
    fingerprint TEXT NOT NULL,
    engine TEXT NOT NULL,
    machine TEXT NOT NULL,
    load_id TEXT NOT NULL,
    term TEXT NOT NULL,
    planned_bytes INTEGER NOT NULL,
    measured_bytes INTEGER NOT NULL,
    recorded_unix_s REAL NOT NULL,
    UNIQUE (load_id, term)
);
CREATE INDEX IF NOT EXISTS by_model ON forecast (fingerprint, engine, machine, id);
INSERT INTO forecast (fingerprint, engine, machine, load_id, term, planned_bytes, measured_bytes,
    recorded_unix_s)
VALUES ('fingerprint', 'llamacpp', 'this machine', 'load 1', 'kv_bytes', 100, 110, 1.0);
"""


@pytest.fixture
def forecasts(tmp_path: Path) -> Path:
    path = tmp_path / "forecasts.sqlite"
    connection = sqlite3.connect(path)
    connection.executescript(FIRST_SCHEMA)
    connection.close()
    return path


def version_of(path: Path) -> int:
    connection = sqlite3.connect(path)
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    connection.close()
    assert isinstance(version, int)
    return version


def test_forecasts_of_the_first_version_are_kept(forecasts: Path) -> None:
    """What was learnt is used and added to, and the file has a version from then on."""
    store = ForecastHistory(forecasts)
    assert store.past_errors(SUBJECT).ratios == {"kv_bytes": (1.1,)}
    store.record(SUBJECT, "load 2", {"kv_bytes": (100, 90)})
    assert store.past_errors(SUBJECT).ratios == {"kv_bytes": (0.9, 1.1)}
    assert store.num_failures == 0
    store.close()
    assert version_of(forecasts) == FORMAT_VERSION


def test_forecasts_of_a_newer_version_are_left_alone(
    forecasts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is read, written or put aside; loads go on, and one line says why."""
    connection = sqlite3.connect(forecasts)
    connection.execute(f"PRAGMA user_version = {FORMAT_VERSION + 1}")
    connection.close()
    store = ForecastHistory(forecasts)
    store.record(SUBJECT, "load 2", {"kv_bytes": (100, 90)})
    assert store.past_errors(SUBJECT).ratios == {}
    store.close()
    assert capsys.readouterr().err.count("it is of a newer brim") == 1
    assert version_of(forecasts) == FORMAT_VERSION + 1
    connection = sqlite3.connect(forecasts)
    assert connection.execute("SELECT count(*) FROM forecast").fetchone() == (1,)
    connection.close()
    assert [path.name for path in forecasts.parent.glob("*.damaged")] == []


def test_new_files_are_their_users_alone(tmp_path: Path) -> None:
    """The file and its journals can be read by nobody else, wherever the directory lies."""
    store = ForecastHistory(tmp_path / "forecasts.sqlite")
    store.record(SUBJECT, "load", {"kv_bytes": (1, 1)})
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {0o600}
    store.close()


def test_a_server_of_an_older_version_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file has no token and no state directory; `stop` ends it all the same."""
    monkeypatch.setattr("brim.config.places.runtime_directory", lambda: tmp_path)
    older = {
        "pid": os.getpid(), "started_unix_s": start_time(os.getpid()), "host": "127.0.0.1",
        "port": 2746, "drain_limit_s": 30.0,
    }  # fmt: skip
    (tmp_path / "server-1.json").write_bytes(msgspec.json.encode(older))
    found = one_server(None)
    assert isinstance(found, ServerState)
    assert (found.port, found.operator_token) == (2746, "")


def test_a_book_with_lines_of_another_version_is_begun_anew(tmp_path: Path) -> None:
    """It holds what runs now, which every server writes again."""
    path = tmp_path / "grants.json"
    path.write_text('[{"process": 7, "bytes": 1}]')
    with Book(path).open() as page:
        assert page.others() == []
        page.write([("model", 1)])
    assert msgspec.json.decode(path.read_bytes())[0]["name"] == "model"


def test_prefixes_of_another_format_are_never_read(tmp_path: Path) -> None:
    """A file with another version in its header is a miss, and the next one replaces it."""
    directory, tokens, toy = tmp_path / "prefixes", [*range(100, 160)], Filler()
    cache = open_store(directory, clock=Clock())
    toy.keep(cache, tokens)
    cache.flush()
    cache.close()
    [entry] = directory.glob("*/*.kv")
    data = bytearray(entry.read_bytes())
    assert struct.unpack_from("<I", data, 8) == (1,)
    struct.pack_into("<I", data, 8, 2)
    entry.write_bytes(data)
    cache = open_store(directory, clock=Clock())
    assert cache.find("", ids(tokens)).num_tokens == 0
    assert toy.keep(cache, tokens)
    cache.flush()
    assert cache.find("", ids(tokens)).num_tokens == len(tokens)
    cache.close()
