"""Directories and files of the cache: what is opened, what is refused, what a crash leaves."""

import errno
import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.prefixes import Filler, ids

from brim.errors import StoreError
from brim.prefix_cache import files
from brim.prefix_cache.model_files import model_bytes, model_hash
from brim.prefix_cache.store import PrefixCache

OpenStore = Callable[..., PrefixCache]

PROMPT = [*range(60)]

DEAD = 2**30
"""Above every process id that a system gives out."""


@pytest.fixture
def entry(cache: PrefixCache, toy: Filler) -> Path:
    """The file of one entry."""
    toy.keep(cache, PROMPT)
    cache.flush()
    return Path(cache.find("", ids(PROMPT)).segments[0].path)


class TestHostileFiles:
    """Whatever lies in the place of an entry, it is a counted miss."""

    def check_is_a_miss(self, cache: PrefixCache, open_cache: OpenStore, path: Path) -> None:
        """Neither the store that knows the entry nor a new one takes what is there."""
        segment = cache.find("", ids(PROMPT)).segments[0]
        assert cache.read(segment) is None
        assert cache.stats().num_damaged == 1
        opened = open_cache()
        assert opened.find("", ids(PROMPT)).segments == ()
        cache.flush()
        assert not os.path.lexists(path)

    def test_a_link_is_not_followed(
        self, cache: PrefixCache, open_cache: OpenStore, entry: Path, tmp_path: Path
    ) -> None:
        """Not even to a whole entry; its target is left alone."""
        target = entry.rename(tmp_path / "elsewhere.kv")
        entry.symlink_to(target)
        self.check_is_a_miss(cache, open_cache, entry)
        assert target.exists()

    def test_a_pipe_does_not_stop_us(
        self, cache: PrefixCache, open_cache: OpenStore, entry: Path
    ) -> None:
        """A named pipe that nobody writes to is refused at once."""
        entry.unlink()
        os.mkfifo(entry, 0o600)
        self.check_is_a_miss(cache, open_cache, entry)

    def test_what_others_can_write_is_refused(
        self, cache: PrefixCache, open_cache: OpenStore, entry: Path
    ) -> None:
        """A file that others could have changed is no entry."""
        entry.chmod(0o666)
        self.check_is_a_miss(cache, open_cache, entry)

    @pytest.mark.parametrize("data", [b"", b"BRIMKVPC", b"x" * 40_000])
    def test_other_contents_are_refused(
        self, cache: PrefixCache, open_cache: OpenStore, entry: Path, data: bytes
    ) -> None:
        """Nothing, less than a header, and something else entirely are each a miss."""
        entry.write_bytes(data)
        self.check_is_a_miss(cache, open_cache, entry)

    def test_directories_that_are_links_are_left_alone(
        self, open_cache: OpenStore, cache: PrefixCache, entry: Path, tmp_path: Path
    ) -> None:
        """A model's directory that is a link elsewhere is neither read nor emptied."""
        cache.close()
        target = entry.parent.rename(tmp_path / "elsewhere")
        entry.parent.symlink_to(target)
        other = open_cache(budget_bytes=0)
        assert other.find("", ids(PROMPT)).segments == ()
        assert (target / entry.name).exists()

    def test_the_cache_itself_may_be_a_link(
        self, open_cache: OpenStore, toy: Filler, directory: Path, tmp_path: Path
    ) -> None:
        """Whoever has a second disk may link the whole directory there."""
        (tmp_path / "disk").mkdir(mode=0o700)
        directory.symlink_to(tmp_path / "disk")
        cache = open_cache()
        toy.keep(cache, PROMPT)
        cache.flush()
        assert toy.assert_restores(cache, PROMPT) == len(PROMPT)

    def test_a_place_for_temporary_files_that_is_a_link_is_refused(
        self, open_cache: OpenStore, toy: Filler, directory: Path, tmp_path: Path
    ) -> None:
        """Nothing is written through a link that somebody laid."""
        directory.mkdir(mode=0o700)
        (directory / "tmp").symlink_to(tmp_path)
        cache = open_cache()
        assert not toy.keep(cache, PROMPT)
        assert cache.stats().skipped == {"refused": 1}


class TestOrphans:
    """What a process that ended in the middle leaves behind."""

    def test_files_of_ended_processes_are_removed(
        self, open_cache: OpenStore, directory: Path
    ) -> None:
        """At the next opening; one that a living process holds stays, as does one just made."""
        open_cache().close()
        place = directory / "tmp"
        held = files.Temporary(place, 100, time.time())
        dead, young, old, nameless = (
            place / f"{name}.tmp" for name in (f"{DEAD}-0-a", f"{os.getpid()}-9-b",
            f"{os.getpid()}-9-c", "nameless")
        )  # fmt: skip
        for path in (dead, young, old, nameless):
            path.write_bytes(b"x")
            path.chmod(0o600)
        for path in (old, held.path):
            os.utime(path, (0, 0))
        open_cache()
        assert sorted(place.iterdir()) == sorted([held.path, young])
        held.remove()
        assert not held.path.exists()

    def test_a_process_of_another_user_is_a_living_one(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A process that may not be signalled runs."""

        def refuse(pid: int, number: int) -> None:
            raise PermissionError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "kill", refuse)
        assert files._is_running(1)

    def test_segments_without_a_parent_are_removed(
        self, open_cache: OpenStore, toy: Filler, directory: Path
    ) -> None:
        """A chain that broke somewhere goes, with everything behind the break."""
        first = open_cache()
        for length in (20, 40, 60):
            toy.keep(first, PROMPT[:length])
        first.flush()
        middle = first.find("", ids(PROMPT)).segments[1]
        first.close()
        Path(middle.path).unlink()
        second = open_cache()
        assert second.find("", ids(PROMPT)).num_tokens == 20
        assert len([*directory.glob("*/*.kv")]) == 1

    def test_other_versions_are_removed_and_strangers_are_not(
        self, open_cache: OpenStore, entry: Path, directory: Path
    ) -> None:
        """An entry of another format goes; a file or directory that is not ours stays."""
        data = bytearray(entry.read_bytes())
        data[8] = 99
        entry.write_bytes(data)
        stranger = entry.parent / "notes.txt"
        stranger.write_text("mine")
        (directory / "more").mkdir()
        (directory / "more" / "x.kv").write_text("mine")
        store = open_cache()
        assert store.stats().num_damaged == 1
        assert not entry.exists()
        assert stranger.exists()
        assert (directory / "more" / "x.kv").exists()

    def test_directories_of_models_without_entries_go(
        self, open_cache: OpenStore, entry: Path
    ) -> None:
        """Where the last entry went, the directory goes at the next opening."""
        entry.unlink()
        open_cache()
        assert not entry.parent.exists()


class TestWriting:
    """How bytes get to the disk."""

    @pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL])
    def test_file_systems_without_reservation_get_zeros(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
    ) -> None:
        """Where blocks cannot be reserved they are written, so that no hole is left."""

        def fails(*arguments: object) -> None:
            raise OSError(number, "not here")

        monkeypatch.setattr(os, "posix_fallocate", fails)
        temporary = files.Temporary(tmp_path, 3 * 1024 * 1024 + 5, 0.0)
        assert temporary.path.stat().st_blocks * 512 >= 3 * 1024 * 1024
        assert bytes(temporary.view[-5:]) == bytes(5)
        temporary.remove()

    def test_systems_without_the_call_get_zeros(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """MacOS has no posix_fallocate."""
        monkeypatch.delattr(os, "posix_fallocate")
        temporary = files.Temporary(tmp_path, 5000, 0.0)
        assert temporary.path.stat().st_size == 5000
        temporary.remove()

    def test_the_platter_is_waited_for_where_the_system_can(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """F_FULLFSYNC comes before fsync, which is left where a file system lacks the former."""
        calls: list[int] = []

        def control(descriptor: int, command: int) -> None:
            calls.append(command)
            if len(calls) > 1:
                raise OSError(errno.ENOTSUP if len(calls) == 2 else errno.EIO, "no")

        monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
        monkeypatch.setattr(fcntl, "fcntl", control)
        synced: list[int] = []
        monkeypatch.setattr(os, "fsync", synced.append)
        files.sync_file(3)
        assert (calls, synced) == ([51], [])
        files.sync_file(3)
        assert synced == [3]
        with pytest.raises(OSError, match="no"):
            files.sync_file(3)

    def test_what_is_missing_is_told_from_what_is_not_private(self, tmp_path: Path) -> None:
        """A missing directory is not private, a missing file is missing, a directory no file."""
        assert not files.is_private_directory(tmp_path / "none")
        with pytest.raises(FileNotFoundError):
            files.open_private(tmp_path / "none")
        with pytest.raises(StoreError):
            files.open_private(tmp_path)


class TestModelFiles:
    """What tells one model's files from another's of the same size."""

    def test_contents_sizes_and_times_count(self, tmp_path: Path) -> None:
        """A change in any sampled place, of the length or of the time, is another model."""
        path = tmp_path / "m.gguf"
        path.write_bytes(bytes(1_000_000))
        os.utime(path, (1, 1))
        found = {model_hash([str(path)])}
        for data in (bytes(1_000_001), b"x" + bytes(999_999), b"y" * 1_000_000):
            path.write_bytes(data)
            os.utime(path, (1, 1))
            found.add(model_hash([str(path)]))
        os.utime(path, (2, 2))
        found.add(model_hash([str(path)]))
        assert len(found) == 5

    def test_missing_files_are_empty(self, tmp_path: Path) -> None:
        """A file that is not there counts nothing, and is told from one that is."""
        path = tmp_path / "m.gguf"
        missing = model_hash([str(path)])
        path.write_bytes(b"12345")
        assert model_hash([str(path)]) != missing != model_hash([])
        assert model_bytes([str(path), str(tmp_path / "none")]) == 5
