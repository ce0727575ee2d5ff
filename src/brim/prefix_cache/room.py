"""The directory as a whole: what lies in it, its budget, its day's writes, and who must go.

Everything that changes the directory holds its lock (`files.locked`), so that several workers and
servers keep one budget together.
"""

import contextlib
import os
import re
import time
from collections.abc import Collection, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from brim.core.cache import CacheOptions
from brim.errors import StoreError
from brim.prefix_cache import eviction, files
from brim.prefix_cache.eviction import Kept
from brim.prefix_cache.format import SUFFIX, Header
from brim.prefix_cache.segment import Skip

UNSURE_NS = 1_000_000_000
"""A listing this soon after the directory's last change may miss one in the same tick of the
clock that stamps it; it is not kept."""

_MODEL_DIRECTORY = re.compile(r"[0-9a-f]{32}")
_DAY_FILE = "written-"
_MAX_DAY_FILE_BYTES = 20
"""A number below 2^64 in decimal digits; a longer file is not ours."""


class Survey:
    """What lies in the directory now, from the names, sizes and headers of files.

    Headers are read once for each file; a directory is listed again only when it has changed.

    Args:
        root: The cache's directory.
        removes_damaged: Remove files that are no entries; otherwise they are only left out.
    """

    def __init__(self, root: Path, *, removes_damaged: bool = True) -> None:
        self._root, self._removes_damaged = root, removes_damaged
        self._listed: dict[str, tuple[int, dict[str, int]]] = {}
        """Model -> when its directory had changed last, and key -> bytes."""
        self._known: dict[str, dict[str, tuple[tuple[int, int], Kept]]] = {}
        """Model -> key -> what tells the file from another of its name, and the entry in it."""
        self.num_damaged = 0
        """Files that are no entries of this version."""

    def models(self) -> list[str]:
        """Names of the models' directories; others, and links, are left alone."""
        with contextlib.suppress(OSError):
            return sorted(
                path.name
                for path in self._root.iterdir()
                if _MODEL_DIRECTORY.fullmatch(path.name) and files.is_private_directory(path)
            )
        return []

    def sizes(self, model: str) -> dict[str, int]:
        """Key -> bytes of the files of one model."""
        path = self._root / model
        changed_ns = changed_at(path)
        known = self._listed.get(model)
        if known is not None and known[0] == changed_ns:
            return known[1]
        found: dict[str, int] = {}
        with contextlib.suppress(OSError), os.scandir(path) as entries:
            for entry in entries:
                if entry.name.endswith(SUFFIX):
                    with contextlib.suppress(OSError):
                        size = entry.stat(follow_symlinks=False).st_size
                        found[entry.name.removesuffix(SUFFIX)] = size
        self._listed.pop(model, None)
        if time.time_ns() - changed_ns > UNSURE_NS:
            self._listed[model] = changed_ns, found
        return found

    def total_bytes(self) -> int:
        """Of all entries of all models."""
        return sum(sum(self.sizes(model).values()) for model in self.models())

    def path(self, model: str, key: str) -> Path:
        """Where an entry lies."""
        return self._root / model / (key + SUFFIX)

    def headers(self, model: str, keys: Iterable[str]) -> Iterator[Header]:
        """Headers of files, in no order; those that are no entries are removed and counted."""
        for key in keys:
            path = self.path(model, key)
            try:
                yield files.read_header(path)
            except StoreError:
                self.num_damaged += 1
                if self._removes_damaged:
                    self.remove(model, key)
            except OSError:
                continue

    def entries(self) -> list[Kept]:
        """Every entry of every model."""
        models = self.models()
        self._known = {model: self._known.get(model, {}) for model in models}
        return [kept for model in models for kept in self._entries_of(model)]

    def remove(self, model: str, key: str) -> bool:
        """Remove a file; whether it is gone."""
        try:
            self.path(model, key).unlink(missing_ok=True)
        except OSError:
            return False
        return True

    def remove_all(self, entries: Iterable[Kept]) -> list[Kept]:
        """Remove files; gives those that are gone."""
        return [kept for kept in entries if self.remove(kept.directory, kept.key)]

    def remove_empty(self) -> None:
        """Remove directories of models that have no entry left."""
        for model in self.models():
            with contextlib.suppress(OSError):
                (self._root / model).rmdir()

    def _entries_of(self, model: str) -> Iterator[Kept]:
        # Made anew each time: files that others removed must not be remembered for ever.
        before, now = self._known.get(model, {}), dict[str, tuple[tuple[int, int], Kept]]()
        self._known[model] = now
        for key in list(self.sizes(model)):
            try:
                status = self.path(model, key).lstat()
            except OSError:
                continue
            same = (status.st_ino, status.st_size)
            known = before.get(key)
            if known is None or known[0] != same:
                for header in self.headers(model, [key]):
                    known = same, _kept(model, key, header)
            if known is not None and known[0] == same:
                now[key] = known
                yield msgspec.structs.replace(known[1], used_unix_s=status.st_mtime)


class Room:
    """The bounds of a cache directory; most methods need its lock.

    Args:
        options: The directory and its bounds.
        own: Name of this model's directory.
        model_name: What this model is called.
        model_paths: Its files.
        opened_unix_s: When this store was opened: what has not been used since may be stale.
    """

    def __init__(
        self,
        options: CacheOptions,
        own: str,
        model_name: str,
        model_paths: tuple[str, ...],
        opened_unix_s: float,
    ) -> None:
        self._options, self._own = options, own
        self._name, self._paths = model_name, frozenset(model_paths)
        self._opened_unix_s = opened_unix_s
        self._root = Path(options.directory)
        self.survey = Survey(self._root)
        self.num_evicted = 0

    def open(self, now_s: float) -> None:
        """Make the directory where it is missing, and collect what a crash left in it.

        Takes the lock itself.

        Raises:
            StoreError: The directory is not safe to use, or locked for too long.
            OSError: It cannot be written.
        """
        files.make_directory(self._root)
        files.make_subdirectory(self._root / "tmp")
        with files.locked(self._root):
            self.collect(now_s)

    def collect(self, now_s: float) -> None:
        """Remove what nothing can use, then what is over the bounds.

        Raises:
            OSError: The directory cannot be read or written.
        """
        files.remove_orphans(self._root / "tmp")
        self.survey.remove_all(eviction.orphans(self.survey.entries()))
        self.make_room(0, now_s)
        self.survey.remove_empty()
        for path in self._root.glob(_DAY_FILE + "*"):
            if path.name != _day_file(now_s):
                path.unlink(missing_ok=True)

    def make_room(
        self,
        num_bytes: int,
        now_s: float,
        protected: Collection[tuple[str, str]] = (),
        *,
        more_free_bytes: int = 0,
    ) -> tuple[Skip | None, list[Kept]]:
        """Remove entries until `num_bytes` more are within the budget and the disk's floor holds.

        Args:
            num_bytes: Of an entry whose file is there already, under another name.
            now_s: Seconds since 1970.
            protected: Entries that must stay, as those that the new one continues.
            more_free_bytes: Wanted on the disk beside its floor.

        Returns:
            Which bound cannot be kept, if any, and the entries that went.

        Raises:
            OSError: The file system cannot be asked.
        """
        gone: list[Kept] = []
        if self._over_budget(num_bytes) > 0:
            # Reading the entries removes damaged files, which may be room enough.
            entries = self.survey.entries()
            gone = self._free(entries, self._over_budget(num_bytes), now_s, protected)
            if self._over_budget(num_bytes) > 0:
                return Skip.BUDGET, gone
        floor_bytes = self._options.free_disk_floor_bytes + more_free_bytes
        short = floor_bytes - files.free_bytes(self._root)
        if short <= 0:
            return None, gone
        more = self._free(self.survey.entries(), short, now_s, protected)
        # By their sizes: what a file system frees may come late, or be shared with other files.
        is_short = sum(each.num_bytes for each in more) < short
        return (Skip.DISK_FLOOR if is_short else None), gone + more

    def _over_budget(self, num_bytes: int) -> int:
        return self.survey.total_bytes() + num_bytes - self._options.budget_bytes

    def _free(
        self,
        entries: list[Kept],
        num_bytes: int,
        now_s: float,
        protected: Collection[tuple[str, str]],
    ) -> list[Kept]:
        chosen = eviction.choose(
            entries, num_bytes, now_s, protected=protected, is_stale=self._is_stale
        )
        gone = self.survey.remove_all(chosen)
        self.num_evicted += len(gone)
        return gone

    def charge(self, num_bytes: int, now_s: float) -> Skip | None:
        """Count a write against the day's; before it begins, so that a crash counts it too.

        Raises:
            OSError: The count cannot be written: the SSD would not be protected.
        """
        total = self.bytes_today(now_s) + num_bytes
        if total > self._options.daily_write_bytes:
            return Skip.DAILY_WRITES
        path = self._root / _day_file(now_s)
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o600)
        try:
            # Digits only get more within a day: the new number covers the old one.
            os.pwrite(descriptor, f"{total:020d}".encode(), 0)
        finally:
            os.close(descriptor)
        return None

    def bytes_today(self, now_s: float) -> int:
        """Bytes that all workers have written since midnight, in UTC."""
        try:
            descriptor = files.open_private(self._root / _day_file(now_s))
        except (OSError, StoreError):
            return 0
        try:
            text = os.pread(descriptor, _MAX_DAY_FILE_BYTES, 0)
        finally:
            os.close(descriptor)
        return int(text) if text.isdigit() else 0

    def _is_stale(self, kept: Kept) -> bool:
        """Whether an entry's model is gone, or is this one in another form that nobody uses.

        Other forms come from another version of the engine, or a file that was replaced; one that
        another worker has used since this store was opened is alive.
        """
        if kept.directory == self._own:
            return False
        if kept.model_name == self._name or self._paths.intersection(kept.model_paths):
            return kept.used_unix_s < self._opened_unix_s
        return not all(map(os.path.exists, kept.model_paths))


def changed_at(path: Path) -> int:
    """When names in a directory changed last, in ns since 1970; 0 where there is none."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _day_file(now_s: float) -> str:
    return _DAY_FILE + datetime.fromtimestamp(now_s, UTC).strftime("%Y-%m-%d")


def _kept(model: str, key: str, header: Header) -> Kept:
    return Kept(
        directory=model,
        key=key,
        parent=header.parent,
        namespace=header.namespace,
        model_name=header.model_name,
        model_paths=header.model_paths,
        model_bytes=header.model_bytes,
        start=header.start,
        end=header.end,
        num_bytes=header.num_bytes,
        used_unix_s=0.0,
    )
