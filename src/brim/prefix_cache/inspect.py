"""The directory from outside any worker: what lies there, is it whole, and what to remove.

Safe beside running servers: changes hold the directory's lock, and what vanishes is their miss.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from brim.core.cache import CacheOptions
from brim.errors import ConfigError, StoreError
from brim.prefix_cache import files
from brim.prefix_cache.eviction import Kept
from brim.prefix_cache.format import Header
from brim.prefix_cache.index import Index
from brim.prefix_cache.room import Room, Survey

CheckBlock = Callable[[str, memoryview], object]
"""Raises StoreError where a block is damaged, or of another identity than the one given."""


class Damage(msgspec.Struct, frozen=True):
    """A file that is no sound entry."""

    path: str
    problem: str


class ModelUse(msgspec.Struct, frozen=True, kw_only=True):
    """What one model, in one form, keeps."""

    model: str
    directory: str
    num_entries: int
    entry_bytes: int
    is_removed: bool
    """Whether its files are gone: its entries are the first to go."""


class DirectoryStats(msgspec.Struct, frozen=True, kw_only=True):
    """The directory against its bounds."""

    directory: str
    num_entries: int
    entry_bytes: int
    budget_bytes: int
    written_bytes_today: int
    daily_write_bytes: int
    free_disk_bytes: int
    free_disk_floor_bytes: int
    models: tuple[ModelUse, ...]


def list_entries(directory: Path) -> list[Kept]:
    """Every entry, last used first; a directory that is not there has none.

    Raises:
        ConfigError: The directory is not safe to use.
    """
    if not _exists(directory):
        return []
    entries = Survey(directory, removes_damaged=False).entries()
    return sorted(entries, key=lambda kept: kept.used_unix_s, reverse=True)


def directory_stats(options: CacheOptions) -> DirectoryStats:
    """What the directory holds, against its bounds.

    Raises:
        ConfigError: The directory is not safe to use.
    """
    directory = Path(options.directory)
    entries = list_entries(directory)
    exists = directory.exists()
    return DirectoryStats(
        directory=options.directory,
        num_entries=len(entries),
        entry_bytes=sum(kept.num_bytes for kept in entries),
        budget_bytes=options.budget_bytes,
        written_bytes_today=_room(options).bytes_today(time.time()),
        daily_write_bytes=options.daily_write_bytes,
        free_disk_bytes=files.free_bytes(_first_that_exists(directory)),
        free_disk_floor_bytes=options.free_disk_floor_bytes,
        models=_uses(entries) if exists else (),
    )


def verify(directory: Path, check_block: CheckBlock, *, remove: bool) -> tuple[int, list[Damage]]:
    """Read every entry whole: header, chain and block.

    Args:
        directory: The cache's.
        check_block: The engines' own check.
        remove: Remove what is damaged.

    Returns:
        How many files there are, and those that are damaged.

    Raises:
        ConfigError: The directory is not safe to use, or locked for too long.
    """
    if not _exists(directory):
        return 0, []
    survey = Survey(directory, removes_damaged=False)
    num_files, damaged = 0, []
    for model in survey.models():
        index = Index(can_cut=True)
        sound: list[Header] = []
        paths = [survey.path(model, key) for key in sorted(survey.sizes(model))]
        num_files += len(paths)
        for path in paths:
            try:
                header, block = files.map_entry(path, None)
                check_block(header.identity, block)
                sound.append(header)
            except (StoreError, OSError) as exc:
                if os.path.lexists(path):
                    damaged.append(Damage(str(path), _printable(str(exc))))
        for header in sorted(sound, key=lambda each: each.start):
            path = survey.path(model, header.key)
            # A server may evict a chain while it is verified: what is gone is not damaged.
            if not index.add(header, str(path)) and os.path.lexists(path):
                damaged.append(Damage(str(path), "it does not continue a sound entry"))
    if remove and damaged:
        with _locked(directory):
            for each in damaged:
                Path(each.path).unlink(missing_ok=True)
    return num_files, damaged


def trim(options: CacheOptions) -> list[Kept]:
    """Remove what a crash left and what is over the bounds; gives the entries that went.

    Raises:
        ConfigError: The directory is not safe to use, or locked for too long.
    """
    if not _exists(Path(options.directory)):
        return []
    room, now_s = _room(options), time.time()
    with _locked(Path(options.directory)):
        before = {kept.place: kept for kept in room.survey.entries()}
        room.collect(now_s)
        left = {kept.place for kept in room.survey.entries()}
    return [kept for place, kept in before.items() if place not in left]


def clear(directory: Path, model_name: str | None = None) -> list[Kept]:
    """Remove all entries, or those of the models of one name; gives what went.

    Raises:
        ConfigError: The directory is not safe to use, locked for too long, or entries stayed.
    """
    if not _exists(directory):
        return []
    survey = Survey(directory)
    with _locked(directory):
        files.remove_orphans(directory / "tmp")
        chosen = [
            kept for kept in survey.entries() if model_name is None or kept.model_name == model_name
        ]
        # Those that continue others go first: a crash in between leaves no broken chain.
        gone = survey.remove_all(sorted(chosen, key=lambda kept: -kept.start))
        survey.remove_empty()
    if len(gone) < len(chosen):
        raise ConfigError(
            f"{len(chosen) - len(gone)} of {len(chosen)} entries in {directory} could not be "
            f"removed; {_remedy(directory)}"
        )
    return gone


def _printable(text: str) -> str:
    """Without terminal codes, which a message may quote from a hostile file.

    Example:
        >>> _printable("a" + chr(27) + "b")
        'a?b'
    """
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _uses(entries: list[Kept]) -> tuple[ModelUse, ...]:
    by_directory: dict[str, list[Kept]] = {}
    for kept in entries:
        by_directory.setdefault(kept.directory, []).append(kept)
    return tuple(
        ModelUse(
            model=group[0].model_name,
            directory=directory,
            num_entries=len(group),
            entry_bytes=sum(kept.num_bytes for kept in group),
            is_removed=not all(Path(path).exists() for path in group[0].model_paths),
        )
        for directory, group in sorted(by_directory.items())
    )


def _room(options: CacheOptions) -> Room:
    """The bounds, of no model: none of the entries is another form of one's own."""
    return Room(options, own="", model_name="", model_paths=(), opened_unix_s=0.0)


def _exists(directory: Path) -> bool:
    if not directory.exists():
        return False
    try:
        files.make_directory(directory)
    except StoreError as exc:
        raise ConfigError(exc.message, param="cache.directory") from exc
    for path in (directory, *map(directory.joinpath, Survey(directory).models())):
        # Or it would look empty, and cleared.
        if not os.access(path, os.R_OK | os.X_OK):
            raise ConfigError(f"{path} cannot be read; {_remedy(directory)}")
    return True


def _remedy(directory: Path) -> str:
    return f"take it back: chmod -R u+rwX '{directory}'"


def _first_that_exists(directory: Path) -> Path:
    return next(path for path in (directory, *directory.parents) if path.exists())


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    try:
        with files.locked(directory):
            yield
    except StoreError as exc:
        raise ConfigError(f"{exc.message}; try again, or stop the process that holds it") from exc
    except OSError as exc:
        raise ConfigError(f"{directory} cannot be changed: {exc.strerror}") from exc
