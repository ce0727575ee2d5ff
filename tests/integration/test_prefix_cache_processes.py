"""Writers in processes of their own: killed in the middle, and several at once."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import cache_writer
from support.prefixes import Filler, ids, open_store

from brim.core.cache import MissReason
from brim.engine import kv_block
from brim.prefix_cache import files
from brim.prefix_cache.inspect import verify

ENTRY_BYTES = 17_500
"""A little more than an entry of these prompts takes."""

BUDGET_BYTES = 6 * ENTRY_BYTES
"""Of the 24 entries that writers would keep: they evict all the time."""

NUM_KILLS = 200

LONGEST_LIFE_S = 0.04
"""A writer needs about two milliseconds for an entry, and many times that on a busy machine."""


class Writers:
    """Starts writers, and waits for them."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def start(self, seed: int, num_prompts: int) -> int:
        """A writer's pid, when it begins to write."""
        return int(self._ask(seed, num_prompts))

    def wait(self) -> list[int]:
        """Exit codes of all that were started."""
        return [int(code) for code in self._ask(0, 0).split()]

    def _ask(self, seed: int, num_prompts: int) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{seed} {num_prompts}\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()


@pytest.fixture
def writers(tmp_path: Path) -> Iterator[Writers]:
    command = [sys.executable, str(Path(cache_writer.__file__)), str(tmp_path / "c")]
    process = subprocess.Popen(
        [*command, str(BUDGET_BYTES)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    yield Writers(process)
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(60) == 0
    assert process.stdout is not None
    process.stdout.close()


def check(directory: Path, toy: Filler) -> int:
    """Open the directory as the next start would, and look at all of it; gives the hits."""
    cache = open_store(directory, budget_bytes=BUDGET_BYTES)
    paths = [*directory.glob("*/*.kv")]
    assert [*(directory / "tmp").iterdir()] == []
    assert sum(path.stat().st_size for path in paths) <= BUDGET_BYTES
    assert cache.stats().num_entries == len(paths)
    assert cache.stats().num_damaged == 0
    num_hits = 0
    for namespace, tokens in cache_writer.all_prompts():
        num_tokens = toy.assert_restores(cache, tokens, namespace)
        assert num_tokens % cache_writer.TURN_TOKENS == 0
        num_hits += num_tokens > 0
        assert cache.find(namespace, ids(tokens)).miss is not MissReason.DAMAGED
    cache.close()
    return num_hits


def test_killed_writers_leave_nothing_wrong(tmp_path: Path, writers: Writers) -> None:
    """After each of 200 kills at random moments: no wrong token, no orphan, the budget kept."""
    chance, toy = random.Random(5), Filler()
    num_hits = num_interrupted = 0
    for seed in range(NUM_KILLS):
        pid = writers.start(seed, 1000)
        time.sleep(chance.uniform(0.0, LONGEST_LIFE_S))
        os.kill(pid, signal.SIGKILL)
        assert writers.wait() == [-signal.SIGKILL]
        num_interrupted += any((tmp_path / "c" / "tmp").glob("*.tmp"))
        num_hits += check(tmp_path / "c", toy)
    # Otherwise nothing was killed in the middle, or nothing was ever kept.
    assert num_interrupted > NUM_KILLS // 10
    assert num_hits > NUM_KILLS


def test_writers_at_once_keep_one_budget(tmp_path: Path, writers: Writers) -> None:
    """Three processes that write the same prompts and others share budget, count and entries."""
    for seed in range(3):
        writers.start(seed, 40)
    assert writers.wait() == [0, 0, 0]
    assert check(tmp_path / "c", Filler()) > 0
    num_files, damaged = verify(tmp_path / "c", kv_block.read, remove=False)
    assert num_files > 0
    assert damaged == []
    with files.locked(tmp_path / "c"):
        (count,) = (tmp_path / "c").glob("written-*")
        assert int(count.read_text()) >= num_files * 16 * 1024
