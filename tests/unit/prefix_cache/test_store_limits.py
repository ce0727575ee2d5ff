"""The store's bounds, each of which holds and is counted, and a disk that does not want to."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.prefixes import Clock, Filler, ids

from brim.core.cache import MissReason
from brim.errors import StoreError
from brim.prefix_cache import files, store
from brim.prefix_cache.health import FAILURES_BEFORE_PAUSE, PAUSE_S, SAY_AGAIN_S
from brim.prefix_cache.segment import Skip
from brim.prefix_cache.store import Model, PrefixCache
from brim.prefix_cache.writer import reason_of, refusal_of

OpenStore = Callable[..., PrefixCache]

DAY_S = 86_400


def prompt(number: int, num_tokens: int = 40) -> list[int]:
    """A prompt that shares nothing with those of other numbers."""
    return [(number * 7 + 3 * i * (number + 1)) % 250 for i in range(num_tokens)]


def files_of(directory: Path) -> list[Path]:
    return sorted(directory.glob("*/*.kv"))


def total_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in files_of(directory))


def entry_bytes(toy: Filler, cache: PrefixCache) -> int:
    """Bytes of an entry of 40 tokens, by writing one and taking it back."""
    assert toy.keep(cache, prompt(99))
    cache.flush()
    return cache.stats().entry_bytes


class TestBudget:
    """Bytes of all entries of all models."""

    def test_the_oldest_go_for_the_newest(
        self, open_cache: OpenStore, toy: Filler, directory: Path, clock: Clock
    ) -> None:
        """The sum of all files never exceeds the budget, and what was used last stays."""
        size = entry_bytes(toy, open_cache())
        cache = open_cache(budget_bytes=3 * size)
        for number in range(2):
            clock.now_s += 60
            toy.keep(cache, prompt(number))
        cache.flush()
        clock.now_s += 60
        toy.restore(cache, prompt(99))
        clock.now_s += 60
        toy.keep(cache, prompt(2))
        cache.flush()
        assert total_bytes(directory) == 3 * size
        kept = [number for number in (99, 0, 1, 2) if cache.find("", ids(prompt(number))).segments]
        assert kept == [99, 1, 2]
        assert cache.stats().num_evicted == 1

    def test_an_entry_beyond_it_is_skipped(self, open_cache: OpenStore, toy: Filler) -> None:
        """What alone is larger than the budget is not written, and evicts nothing."""
        size = entry_bytes(toy, open_cache())
        cache = open_cache(budget_bytes=size)
        assert not toy.keep(cache, prompt(1, 80))
        assert cache.stats().skipped == {"budget": 1}
        assert cache.stats().num_entries == 1

    def test_a_chain_is_not_evicted_for_its_own_end(
        self, open_cache: OpenStore, toy: Filler, directory: Path
    ) -> None:
        """A segment for which only those before it could go is skipped."""
        tokens = prompt(1, 120)
        cache = open_cache()
        toy.keep(cache, tokens[:40])
        toy.keep(cache, tokens[:80])
        cache.flush()
        tight = open_cache(budget_bytes=total_bytes(directory) + 100)
        assert toy.keep(tight, tokens)
        tight.flush()
        assert tight.stats().skipped == {"budget": 1}
        assert tight.find("", ids(tokens)).num_tokens == tight.stored("", ids(tokens)) == 80

    def test_it_is_enforced_when_a_store_is_opened(
        self, open_cache: OpenStore, toy: Filler, directory: Path
    ) -> None:
        """A smaller budget takes effect before the first request, over all models."""
        first = open_cache()
        other = open_cache(model=Model(name="x", paths=(), identity="x"))
        for number in range(3):
            toy.keep(first, prompt(number))
        toy.keep(other, prompt(0))
        first.close()
        other.close()
        size = total_bytes(directory) // 4
        assert open_cache(budget_bytes=2 * size).stats().num_evicted == 2
        assert total_bytes(directory) <= 2 * size

    def test_damage_that_eviction_meets_is_counted_and_forgotten(
        self, open_cache: OpenStore, toy: Filler, directory: Path
    ) -> None:
        """A file that is no entry any more goes when room is made, and is not found afterwards."""
        size = entry_bytes(toy, open_cache())
        cache = open_cache(budget_bytes=size + 200)
        (path,) = files_of(directory)
        path.write_bytes(b"damaged" * (size // 7))
        toy.keep(cache, prompt(1))
        cache.flush()
        cache.find("", ids(prompt(1)))
        cache.flush()
        assert (cache.stats().num_damaged, cache.stats().num_entries) == (1, 1)
        assert cache.find("", ids(prompt(99))).segments == ()

    def test_entries_of_removed_models_go_first(
        self, open_cache: OpenStore, toy: Filler, directory: Path, clock: Clock, tmp_path: Path
    ) -> None:
        """What no model can use any more goes before an entry that is older."""
        file = tmp_path / "model.gguf"
        file.write_bytes(b"weights")
        size = entry_bytes(toy, open_cache())
        clock.now_s += DAY_S
        removed = open_cache(model=Model(name="r", paths=(str(file),), identity="r"))
        toy.keep(removed, prompt(1))
        removed.close()
        assert len(files_of(directory)) == 2
        cache = open_cache(budget_bytes=2 * size + 200)
        file.unlink()
        toy.keep(cache, prompt(2))
        cache.flush()
        assert cache.find("", ids(prompt(99))).segments
        assert cache.find("", ids(prompt(2))).segments

    @pytest.mark.parametrize("is_in_use", [False, True])
    def test_another_form_of_this_model_goes_first_unless_it_is_in_use(
        self, open_cache: OpenStore, toy: Filler, clock: Clock, is_in_use: bool
    ) -> None:
        """Entries of another engine version go before older ones, unless a worker reads them."""
        size = entry_bytes(toy, open_cache())
        clock.now_s += DAY_S
        newer = open_cache(model=Model(name="toy", paths=(), identity="toy, newer"))
        toy.keep(newer, prompt(1))
        newer.flush()
        clock.now_s += 60
        cache = open_cache(budget_bytes=2 * size + 200)
        clock.now_s += 60
        segment = newer.find("", ids(prompt(1))).segments[0]
        if is_in_use:
            assert newer.read(segment) is not None
        toy.keep(cache, prompt(3))
        cache.flush()
        assert cache.find("", ids(prompt(3))).segments
        assert bool(cache.find("", ids(prompt(99))).segments) is not is_in_use
        assert (newer.read(segment) is not None) is is_in_use


class TestDailyWrites:
    """Bytes written in a day, for the SSD's sake."""

    def test_they_are_bounded_and_begin_anew_with_the_day(
        self, open_cache: OpenStore, toy: Filler, directory: Path, clock: Clock
    ) -> None:
        """The day's count holds over restarts, and the next day has its own."""
        size = entry_bytes(toy, open_cache())
        first = open_cache(daily_write_bytes=2 * size)
        assert toy.keep(first, prompt(1))
        first.close()
        second = open_cache(daily_write_bytes=2 * size)
        assert second.stats().written_bytes_today == 2 * size
        assert not toy.keep(second, prompt(2))
        assert second.stats().skipped == {"daily writes": 1}
        clock.now_s += DAY_S
        assert second.stats().written_bytes_today == 0
        assert toy.keep(second, prompt(2))
        second.flush()
        assert second.stats().written_bytes_today == size
        open_cache()
        assert len([*directory.glob("written-*")]) == 1

    def test_two_stores_share_them(self, open_cache: OpenStore, toy: Filler) -> None:
        """What one worker wrote is not there for the other; what is in flight counts too."""
        size = entry_bytes(toy, open_cache())
        left, right = (open_cache(daily_write_bytes=3 * size) for _ in range(2))
        assert toy.keep(left, prompt(1))
        left.flush()
        assert toy.keep(right, prompt(2))
        assert not toy.keep(right, prompt(3))
        right.flush()
        assert right.stats().written_bytes_today == 3 * size

    def test_two_stores_at_once_are_told_apart_when_they_write(
        self, open_cache: OpenStore, toy: Filler, directory: Path
    ) -> None:
        """Where both saw room for one entry, the second to write is dropped, and counted."""
        size = entry_bytes(toy, open_cache())
        stores = [open_cache(daily_write_bytes=2 * size) for _ in range(2)]
        with files.locked(directory):
            for number, each in enumerate(stores):
                assert toy.keep(each, prompt(number))
        for each in stores:
            each.flush()
        assert sum(each.stats().skipped.get("daily writes", 0) for each in stores) == 1
        assert len(files_of(directory)) == 2

    def test_a_damaged_count_is_none(
        self, cache: PrefixCache, toy: Filler, directory: Path
    ) -> None:
        """A count that is no number begins anew, and is whole again after the next write."""
        size = entry_bytes(toy, cache)
        (path,) = directory.glob("written-*")
        path.write_bytes(b"many")
        assert cache.stats().written_bytes_today == 0
        toy.keep(cache, prompt(1))
        cache.flush()
        assert cache.stats().written_bytes_today == size


class TestOtherBounds:
    """Shortest prefix, bytes in flight, the disk's floor."""

    def test_short_prefixes_are_skipped(self, open_cache: OpenStore, toy: Filler) -> None:
        """A prefix of fewer tokens than the bound is not kept; one of as many is."""
        cache = open_cache(min_tokens=40)
        assert not toy.keep(cache, prompt(1, 39))
        assert toy.keep(cache, prompt(1, 40))
        assert cache.stats().skipped == {"too short": 1}

    def test_bytes_in_flight_are_bounded(
        self, open_cache: OpenStore, toy: Filler, directory: Path
    ) -> None:
        """While the disk is behind, no more is exported than the bound; then it goes on."""
        size = entry_bytes(toy, open_cache())
        cache = open_cache(max_inflight_bytes=2 * size)
        with files.locked(directory):
            assert toy.keep(cache, prompt(1))
            assert toy.keep(cache, prompt(2))
            assert not toy.keep(cache, prompt(3))
            assert cache.stats().inflight_bytes == 2 * size
        cache.flush()
        assert cache.stats().inflight_bytes == 0
        assert cache.stats().skipped == {"in flight": 1}
        assert toy.keep(cache, prompt(3))

    def test_files_in_flight_are_bounded(
        self,
        cache: PrefixCache,
        toy: Filler,
        directory: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Small entries do not take any number of open files."""
        monkeypatch.setattr(store, "MAX_INFLIGHT", 2)
        toy.keep(cache, prompt(0))
        cache.flush()
        with files.locked(directory):
            assert [toy.keep(cache, prompt(number)) for number in (1, 2, 3)] == [True, True, False]
        assert cache.stats().skipped == {"in flight": 1}

    def test_nothing_is_written_where_nothing_may_be_in_flight(
        self, open_cache: OpenStore, toy: Filler
    ) -> None:
        """A bound of 0 keeps what is there readable and adds nothing."""
        first = open_cache()
        toy.keep(first, prompt(1))
        first.close()
        cache = open_cache(max_inflight_bytes=0)
        assert not toy.keep(cache, prompt(2))
        assert toy.assert_restores(cache, prompt(1)) == 40

    def test_entries_go_before_the_disks_floor_is_touched(
        self, open_cache: OpenStore, toy: Filler, directory: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        """Below the floor nothing is written, entries give way, and one event says so."""
        cache = open_cache(free_disk_floor_bytes=1)
        toy.keep(cache, prompt(1))
        cache.flush()
        low = open_cache(free_disk_floor_bytes=2**62)
        assert files_of(directory) == []
        for _ in range(3):
            assert not toy.keep(low, prompt(2))
        assert low.stats().skipped == {"disk floor": 3}
        assert capsys.readouterr().err.count('prefix_not_kept reason="disk floor"') == 1

    def test_a_write_that_met_the_floor_makes_room_for_the_next(
        self, cache: PrefixCache, toy: Filler, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Entries go as long as the disk is short, so that the next prefix finds room."""
        size = entry_bytes(toy, cache)
        free = iter([size - 1, size - 1, size, size])
        monkeypatch.setattr(files, "free_bytes", lambda path: next(free))
        assert not toy.keep(cache, prompt(1))
        cache.flush()
        assert cache.stats().num_evicted == 1
        assert toy.keep(cache, prompt(1))
        cache.flush()
        assert cache.stats().num_entries == 1

    def test_a_disk_at_its_floor_is_said_once_an_hour(
        self, cache: PrefixCache, toy: Filler, clock: Clock, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        """There every second entry is kept, which is no event each time."""

        def kept_and_not(number: int) -> None:
            toy.keep(cache, prompt(number))
            cache.flush()
            with monkeypatch.context() as patch:
                patch.setattr(files, "free_bytes", lambda path: 0)
                toy.keep(cache, prompt(number + 1))
                cache.flush()

        for number in range(3):
            kept_and_not(number * 2)
        said = capsys.readouterr().err
        assert said.count("prefix_not_kept") == 1
        assert "problem=" not in said
        assert cache.stats().skipped == {"disk floor": 3}
        clock.now_s += SAY_AGAIN_S
        for number in range(3, 5):
            kept_and_not(number * 2)
        assert capsys.readouterr().err.count("prefix_not_kept") == 1

    def test_a_disk_that_fills_while_an_entry_is_written(
        self, open_cache: OpenStore, toy: Filler, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where the floor does not hold at the rename, and nothing can go, the entry is dropped."""
        cache = open_cache(free_disk_floor_bytes=10**6)
        free = iter([10**9, 0])
        monkeypatch.setattr(files, "free_bytes", lambda path: next(free))
        assert toy.keep(cache, prompt(1))
        cache.flush()
        assert cache.stats().skipped == {"disk floor": 1}
        assert cache.stats().num_entries == 0


class TestFailures:
    """A disk that fails costs a warning, never a request."""

    def test_a_full_disk_is_left_alone_for_a_while(
        self, cache: PrefixCache, toy: Filler, clock: Clock, directory: Path,
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        """Each failure is counted, one event is written, and after some nothing is exported."""

        def full(*arguments: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", full)
            for _ in range(FAILURES_BEFORE_PAUSE + 2):
                assert not toy.keep(cache, prompt(1))
        assert cache.stats().skipped == {"no space": FAILURES_BEFORE_PAUSE, "paused": 2}
        assert capsys.readouterr().err.count("prefix_not_kept") == 1
        assert list((directory / "tmp").iterdir()) == []
        clock.now_s += PAUSE_S
        assert toy.keep(cache, prompt(1))
        cache.flush()
        assert toy.assert_restores(cache, prompt(1)) == 40

    def test_a_clock_that_is_put_back_ends_a_pause(
        self, cache: PrefixCache, toy: Filler, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Otherwise nothing would be kept until it has caught up, be it a year."""

        def full(*arguments: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", full)
            for _ in range(FAILURES_BEFORE_PAUSE + 1):
                toy.keep(cache, prompt(1))
        assert cache.stats().skipped["paused"] == 1
        clock.now_s -= 365 * DAY_S
        assert toy.keep(cache, prompt(1))

    def test_pauses_grow_until_an_entry_is_kept(
        self, cache: PrefixCache, toy: Filler, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A disk that stays full is tried less and less often."""

        def full(*arguments: object) -> None:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")

        monkeypatch.setattr(os, "posix_fallocate", full)
        for _ in range(FAILURES_BEFORE_PAUSE):
            toy.keep(cache, prompt(1))
        clock.now_s += PAUSE_S
        toy.keep(cache, prompt(1))
        clock.now_s += PAUSE_S
        toy.keep(cache, prompt(1))
        assert cache.stats().skipped == {"no space": FAILURES_BEFORE_PAUSE + 1, "paused": 1}

    def test_an_entry_that_did_not_reach_the_disk_is_gone(
        self, cache: PrefixCache, toy: Filler, directory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """After a failed fsync nobody knows what is on the disk: the file is not kept."""

        def fails(descriptor: int) -> None:
            raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(files, "sync_file", fails)
            assert toy.keep(cache, prompt(1))
            assert toy.keep(cache, [*prompt(1), *range(30)])
            cache.flush()
        assert cache.stats().skipped == {"write failed": 2}
        assert cache.stats().inflight_bytes == 0
        assert files_of(directory) == list((directory / "tmp").iterdir()) == []
        assert cache.stored("", ids(prompt(1))) == 0

    def test_what_continues_a_dropped_entry_is_dropped(
        self, cache: PrefixCache, toy: Filler, directory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A segment whose parent did not arrive is skipped; no file waits for a parent."""
        real, calls = files.sync_file, []

        def fails_once(descriptor: int) -> None:
            calls.append(descriptor)
            if len(calls) == 1:
                raise OSError(errno.EIO, "Input/output error")
            real(descriptor)

        monkeypatch.setattr(files, "sync_file", fails_once)
        with files.locked(directory):
            toy.keep(cache, prompt(1))
            toy.keep(cache, [*prompt(1), *range(30)])
        cache.flush()
        assert cache.stats().skipped == {"write failed": 1, "no parent": 1}
        assert files_of(directory) == []

    def test_a_directory_that_cannot_be_written_is_read(
        self, open_cache: OpenStore, toy: Filler, directory: Path, clock: Clock,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        """Entries of a directory without a usable lock are found; one event says why no more."""
        first = open_cache()
        toy.keep(first, prompt(1))
        first.close()
        (directory / "lock").unlink()
        (directory / "lock").mkdir()
        cache = open_cache()
        assert toy.assert_restores(cache, prompt(1)) == 40
        assert not toy.keep(cache, prompt(2))
        assert cache.stats().skipped == {"write failed": 1}
        assert capsys.readouterr().err.count("prefix_not_kept") == 1
        clock.now_s += PAUSE_S
        assert not toy.keep(cache, prompt(2))
        cache.flush()
        (directory / "lock").rmdir()
        clock.now_s += 10 * PAUSE_S
        assert not toy.keep(cache, prompt(2))
        cache.flush()
        assert toy.keep(cache, prompt(2))

    def test_a_directory_that_cannot_be_made_keeps_nothing(
        self, open_cache: OpenStore, toy: Filler, directory: Path
    ) -> None:
        """A file in its way is one warning, and every look-up a miss."""
        directory.write_text("mine")
        cache = open_cache()
        assert cache.find("", ids(prompt(1))).miss is MissReason.NO_ENTRY
        assert not toy.keep(cache, prompt(1))
        assert cache.stats().skipped == {"refused": 1}
        assert directory.read_text() == "mine"

    def test_a_directory_that_others_can_write_is_refused(
        self, open_cache: OpenStore, toy: Filler, directory: Path, clock: Clock,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        """Whoever can write there could feed answers: nothing is read until the right is taken."""
        first = open_cache()
        toy.keep(first, prompt(1))
        first.close()
        directory.chmod(0o777)
        cache = open_cache()
        assert cache.find("", ids(prompt(1))).segments == ()
        assert not toy.keep(cache, prompt(2))
        assert "chmod go-w" in capsys.readouterr().err
        directory.chmod(0o700)
        clock.now_s += PAUSE_S
        toy.keep(cache, prompt(2))
        cache.flush()
        cache.find("", ids(prompt(1)))
        cache.flush()
        assert toy.assert_restores(cache, prompt(1)) == 40

    def test_a_directory_that_goes_away_is_missed(
        self, cache: PrefixCache, toy: Filler, directory: Path
    ) -> None:
        """When somebody removes everything, requests go on, and nothing is found."""
        toy.keep(cache, prompt(1))
        cache.flush()
        segment = cache.find("", ids(prompt(1))).segments[0]
        shutil.rmtree(directory)
        assert cache.read(segment) is None
        cache.flush()
        assert cache.find("", ids(prompt(1))).segments == ()
        assert not toy.keep(cache, prompt(2))
        assert cache.stats().skipped == {"write failed": 1}

    @pytest.mark.parametrize("gone", [".", "tmp"])
    def test_a_directory_that_went_away_is_made_again(
        self, cache: PrefixCache, toy: Filler, directory: Path, gone: str
    ) -> None:
        """After one entry that finds no place, the next ones are kept as ever, in private."""
        toy.keep(cache, prompt(1))
        cache.flush()
        shutil.rmtree(directory / gone)
        assert not toy.keep(cache, prompt(2))
        cache.flush()
        assert toy.keep(cache, prompt(2))
        cache.flush()
        assert toy.assert_restores(cache, prompt(2)) == 40
        assert directory.stat().st_mode & 0o077 == 0

    @pytest.mark.parametrize(
        ("error", "reason", "refusal"),
        [
            (OSError(errno.ENOSPC, ""), Skip.NO_SPACE, Skip.NO_SPACE),
            (OSError(errno.EROFS, ""), Skip.READ_ONLY, Skip.READ_ONLY),
            (PermissionError(errno.EACCES, ""), Skip.READ_ONLY, Skip.READ_ONLY),
            (OSError(errno.EIO, ""), Skip.WRITE_FAILED, Skip.WRITE_FAILED),
            (StoreError(""), Skip.WRITE_FAILED, Skip.REFUSED),
        ],
    )
    def test_errors_have_reasons(self, error: Exception, reason: Skip, refusal: Skip) -> None:
        """What the system says becomes one of few reasons."""
        assert (reason_of(error), refusal_of(error)) == (reason, refusal)


class TestOtherProcesses:
    """Several stores on one directory."""

    def test_entries_of_others_are_found(self, open_cache: OpenStore, toy: Filler) -> None:
        """What another worker wrote is found by the look-up after the one that noticed."""
        left, right = open_cache(), open_cache()
        toy.keep(left, prompt(1))
        left.flush()
        right.find("", ids(prompt(1)))
        right.flush()
        assert toy.assert_restores(right, prompt(1)) == 40

    def test_entries_that_others_removed_are_forgotten(
        self, open_cache: OpenStore, toy: Filler, directory: Path
    ) -> None:
        """What another worker evicted is no entry any more, before it is read in vain."""
        left = open_cache()
        toy.keep(left, prompt(1))
        left.flush()
        open_cache(budget_bytes=0)
        left.find("", ids(prompt(1)))
        left.flush()
        assert left.find("", ids(prompt(1))).segments == ()
        assert left.stats().num_entries == 0

    def test_both_may_write_the_same(
        self, open_cache: OpenStore, toy: Filler, directory: Path
    ) -> None:
        """Two workers that read one prompt at once leave one file, which both find."""
        stores = [open_cache(), open_cache()]
        for each in stores:
            assert toy.keep(each, prompt(1))
        for each in stores:
            each.flush()
        assert len(files_of(directory)) == 1
        for each in stores:
            assert toy.assert_restores(each, prompt(1)) == 40

    def test_a_lock_that_is_never_released_costs_an_entry(
        self, cache: PrefixCache, toy: Filler, directory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A process that hangs with the lock is waited for only so long."""
        monkeypatch.setattr(files, "LOCK_LIMIT_S", 0.0)
        with files.locked(directory):
            toy.keep(cache, prompt(1))
            cache.flush()
        assert cache.stats().skipped == {"write failed": 1}
        assert toy.keep(cache, prompt(1))
