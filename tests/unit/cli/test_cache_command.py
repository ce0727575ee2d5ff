"""`brim cache`: looking at the prefix cache and cleaning it."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from support.prefixes import Filler, ids, open_store

from brim.cli.app import main
from brim.prefix_cache import files
from brim.prefix_cache.room import Survey
from brim.prefix_cache.store import Model

PROMPT = [*range(60)]


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory that the settings name."""
    monkeypatch.setenv("BRIM_CACHE_DIRECTORY", str(tmp_path / "c"))
    monkeypatch.setenv("BRIM_CACHE_FREE_DISK_FLOOR_BYTES", "0")
    return tmp_path / "c"


@pytest.fixture
def filled(directory: Path) -> Path:
    """A chain of two entries of one model, and one entry of a model that is removed."""
    toy = Filler()
    cache = open_store(directory)
    toy.keep(cache, PROMPT[:40], namespace="app")
    toy.keep(cache, PROMPT, namespace="app")
    cache.close()
    removed = open_store(
        directory, model=Model(name="old", paths=("/none/m.gguf",), identity="toy")
    )
    toy.keep(removed, PROMPT)
    removed.close()
    return directory


def asked(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> Any:
    assert main(["cache", *words, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert main(["cache", *words]) == code
    return capsys.readouterr().out


def test_list_shows_every_entry(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Model, namespace, tokens, size and last use of each, as a table and as JSON."""
    rows = asked(capsys, "list")
    assert sorted((row["model_name"], row["start"], row["end"]) for row in rows) == [
        ("old", 0, 60), ("toy", 0, 40), ("toy", 40, 60),
    ]  # fmt: skip
    assert {row["namespace"] for row in rows} == {"app", ""}
    lines = said(capsys, "list").splitlines()
    assert lines[0].split()[:2] == ["model", "namespace"]
    assert len(lines) == 4


def test_looking_changes_nothing(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither a damaged file nor a use's time is touched by list, stats and verify."""
    (path, *_) = sorted(filled.glob("*/*.kv"))
    path.write_bytes(b"damaged")
    before = {each: each.stat().st_mtime_ns for each in filled.rglob("*")}
    for words in (["list"], ["stats"]):
        said(capsys, *words)
    said(capsys, "verify", code=1)
    assert {each: each.stat().st_mtime_ns for each in filled.rglob("*")} == before


def test_stats_hold_against_the_bounds(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Entries, bytes, the day's writes, and the models that are removed."""
    found = asked(capsys, "stats")
    total = sum(path.stat().st_size for path in filled.glob("*/*.kv"))
    assert (found["num_entries"], found["entry_bytes"]) == (3, total)
    assert found["budget_bytes"] == 16 * 2**30
    assert found["free_disk_bytes"] > 0
    assert {(use["model"], use["num_entries"], use["is_removed"]) for use in found["models"]} == {
        ("toy", 2, False), ("old", 1, True),
    }  # fmt: skip
    text = said(capsys, "stats")
    assert "3 entries" in text
    assert "old (removed)" in text


def test_verify_finds_damage_and_removes_it(
    filled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A flipped byte of a block and the chain behind it are damage; sound entries are not."""
    assert asked(capsys, "verify") == {"num_entries": 3, "damaged": [], "is_removed": False}
    assert said(capsys, "verify") == "3 entries read\n"
    base = next(row for row in asked(capsys, "list") if row["end"] == 40)
    path = filled / base["directory"] / f"{base['key']}.kv"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    found = asked(capsys, "verify", code=1)
    assert found["damaged"][0]["path"] == str(path)
    assert len(found["damaged"]) == 2
    assert "2 damaged; remove them with: brim cache verify --remove" in said(
        capsys, "verify", code=1
    )
    assert "2 removed" in said(capsys, "verify", "--remove")
    assert asked(capsys, "verify") == {"num_entries": 1, "damaged": [], "is_removed": False}


def test_a_chain_that_goes_while_it_is_verified_is_not_damaged(
    filled: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that evicts beside it makes no sound cache look damaged."""
    whole = files.map_entry

    def evicted(path: Path, used_unix_s: float | None) -> Any:
        header, block = whole(path, used_unix_s)
        path.unlink()
        if not header.start:  # gone just before it was opened
            raise FileNotFoundError(path)
        return header, block

    monkeypatch.setattr(files, "map_entry", evicted)
    assert asked(capsys, "verify")["damaged"] == []


@pytest.mark.parametrize("size", ["-1", "nan", "inf", "1e300", "much"])
def test_a_size_that_is_none_is_one_sentence(
    filled: Path, size: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is removed for it, and the message names the option."""
    assert main(["cache", "trim", "--to", size]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "Invalid value for '--to'" in line
    assert len(asked(capsys, "list")) == 3


def test_trim_takes_removed_models_first(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Within the budget nothing goes; below it, entries of removed models do before others."""
    assert said(capsys, "trim") == "0 entries removed, 0 MiB\n"
    size = max(path.stat().st_size for path in filled.glob("*/*.kv"))
    found = asked(capsys, "trim", "--to", str(2 * size / 2**30))
    assert found["num_removed"] == 1
    assert {row["model_name"] for row in asked(capsys, "list")} == {"toy"}
    assert asked(capsys, "trim", "--to", "0")["num_removed"] == 2


def test_clear_removes_one_model_or_all(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model's entries by its name, then the rest; an unknown name is an error that says more."""
    assert asked(capsys, "clear", "--model", "old")["num_removed"] == 1
    assert main(["cache", "clear", "--model", "old"]) == 1
    assert "there are entries of: toy" in capsys.readouterr().err
    assert said(capsys, "clear").startswith("2 entries removed")
    assert [*filled.glob("*/*.kv")] == []


def test_a_cache_that_was_never_used_is_empty(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No command makes the directory, and none fails without it."""
    assert asked(capsys, "list") == []
    assert asked(capsys, "stats")["num_entries"] == 0
    assert said(capsys, "verify") == "0 entries read\n"
    for command in ("trim", "clear"):
        assert asked(capsys, command)["num_removed"] == 0
    assert not directory.exists()


def test_an_unsafe_directory_is_one_sentence(
    filled: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What others can write, what hangs and what cannot be locked is said, with the remedy."""
    filled.chmod(0o777)
    assert main(["cache", "list"]) == 1
    assert "chmod go-w" in capsys.readouterr().err
    filled.chmod(0o700)
    with monkeypatch.context() as patch:
        patch.setattr(os, "getuid", lambda: filled.stat().st_uid + 1)
        assert main(["cache", "list"]) == 1
    assert "belongs to another user" in capsys.readouterr().err
    monkeypatch.setattr(files, "LOCK_LIMIT_S", 0.0)
    with files.locked(filled):
        assert main(["cache", "clear"]) == 1
    assert "keeps the prefix cache locked; try again" in capsys.readouterr().err
    (filled / "lock").unlink()
    (filled / "lock").mkdir()
    assert main(["cache", "trim"]) == 1
    assert "cannot be changed" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["list", "stats", "verify", "trim", "clear"])
def test_what_cannot_be_read_is_not_called_empty(
    filled: Path, command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory without its rights is an error, whether the cache's own or a model's."""
    real, models = os.access, sorted(path.parent for path in filled.glob("*/*.kv"))
    for closed in (filled, models[0]):
        with monkeypatch.context() as patch:  # root may read everything
            patch.setattr(
                os, "access", lambda path, mode, closed=closed: path != closed and real(path, mode)
            )
            assert main(["cache", command]) == 1
        assert f"{closed} cannot be read; take it back: chmod" in capsys.readouterr().err
    assert len(asked(capsys, "list")) == 3


def test_entries_that_stay_are_said(
    filled: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clear that the system refuses does not look like one that worked."""
    monkeypatch.setattr(Survey, "remove", lambda self, model, key: model == "none")
    assert main(["cache", "clear"]) == 1
    assert "3 of 3 entries" in capsys.readouterr().err


def test_a_running_store_survives_a_clear(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A worker whose entries were cleared finds nothing, and keeps new ones."""
    toy, cache = Filler(), open_store(filled)
    said(capsys, "clear")
    cache.find("app", ids(PROMPT))
    cache.flush()
    assert cache.find("app", ids(PROMPT)).segments == ()
    assert toy.keep(cache, PROMPT, namespace="app")
    cache.flush()
    assert toy.assert_restores(cache, PROMPT, "app") == len(PROMPT)
    cache.close()
