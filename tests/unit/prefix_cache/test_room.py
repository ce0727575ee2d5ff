"""What lies in the directory, and long entries."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.prefixes import Filler, ids

from brim.prefix_cache.room import Survey
from brim.prefix_cache.store import Allocate, PrefixCache

OpenStore = Callable[..., PrefixCache]

PROMPT = [*range(60)]


def test_a_directory_that_is_not_there_is_empty(tmp_path: Path) -> None:
    """No models, no entries, no bytes, and no error."""
    survey = Survey(tmp_path / "none")
    assert (survey.models(), survey.entries(), survey.total_bytes()) == ([], [], 0)
    assert survey.sizes("0" * 32) == {}


def test_what_vanishes_while_it_is_read_is_left_out(
    cache: PrefixCache, toy: Filler, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that went between its name and its header is no entry and no damage."""
    toy.keep(cache, PROMPT)
    cache.flush()
    survey = Survey(directory)
    (model,) = survey.models()
    assert list(survey.headers(model, ["0" * 32])) == []
    monkeypatch.setattr(Survey, "sizes", lambda survey, model: {"0" * 32: 1})
    assert survey.entries() == []
    assert survey.num_damaged == 0


def test_what_cannot_be_removed_counts_as_there(
    cache: PrefixCache, toy: Filler, directory: Path
) -> None:
    """A directory in the place of an entry is not counted as freed."""
    toy.keep(cache, PROMPT)
    cache.flush()
    survey = Survey(directory)
    (kept,) = survey.entries()
    path = survey.path(kept.directory, kept.key)
    path.unlink()
    path.mkdir()
    assert survey.remove_all([kept]) == []
    assert path.exists()


def test_what_others_removed_is_forgotten(cache: PrefixCache, toy: Filler, directory: Path) -> None:
    """What is remembered of files is bounded by the files that are there."""
    toy.keep(cache, PROMPT)
    toy.keep(cache, PROMPT[::-1])
    cache.flush()
    survey = Survey(directory)
    (model,) = survey.models()
    gone, stays = survey.entries()
    survey.path(model, gone.key).unlink()
    assert survey.entries() == [stays]
    assert [*survey._known[model]] == [stays.key]
    shutil.rmtree(directory / model)
    assert survey.entries() == []
    assert survey._known == {}


def test_an_unchanged_directory_is_not_listed_again(
    cache: PrefixCache, toy: Filler, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long after its last change a listing is kept; right after it, nothing is sure yet."""
    toy.keep(cache, PROMPT)
    cache.flush()
    survey = Survey(directory)
    (model,) = survey.models()
    scans: list[str] = []
    real = os.scandir

    def scan(path: Path) -> Any:
        scans.append(str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scan)
    for _ in range(2):
        assert len(survey.sizes(model)) == 1
    assert len(scans) == 2
    os.utime(directory / model, (1, 1))
    for _ in range(3):
        assert len(survey.sizes(model)) == 1
    assert len(scans) == 3


def test_long_segments_have_long_headers(cache: PrefixCache) -> None:
    """More tokens than one page holds come back, and the block behind them, from the disk."""
    tokens = (np.arange(20_000) % 32_000).astype(np.int32)
    payload = os.urandom(100_000)

    def export(allocate: Allocate) -> None:
        view = allocate(len(payload))
        view[:] = payload

    assert cache.write("", tokens, 0, export)
    cache.flush()
    (segment,) = cache.find("", tokens).segments
    block = cache.read(segment)
    assert block is not None
    assert bytes(block) == payload
    assert np.array_equal(segment.tokens, tokens)
    assert block.readonly


def test_a_long_entry_is_read_again_by_the_next_store(open_cache: OpenStore) -> None:
    """An index that is made from headers alone has every token of a long segment."""
    tokens = (np.arange(9_000) % 32_000).astype(np.int32)
    first = open_cache()
    assert first.write("", tokens, 0, lambda allocate: allocate(10).tobytes())
    first.close()
    second = open_cache()
    assert second.find("", tokens).num_tokens == 9_000
    assert second.find("", ids([*range(8_000)])).num_tokens == 8_000
