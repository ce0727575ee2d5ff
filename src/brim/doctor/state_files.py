"""brim's own files: who may do what with them, and what earlier servers left behind."""

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from brim.config.tree import Settings
from brim.doctor.facts import Permission, StaleState
from brim.runtime.leftovers import leftovers
from brim.runtime.orphans import find_orphans, stale_notes

DAMAGED = "*.damaged"

OTHERS_ENTER = 0o011

SECRETS = ("*.sqlite", "*.sqlite-wal", "server-*.json")
"""Hashes of keys, who used what, and operators' tokens."""


def read_permissions(
    directories: Sequence[Path], files: Sequence[Path] = ()
) -> tuple[Permission, ...]:
    """Modes and owners of brim's directories, the secrets in them, and further files.

    Args:
        directories: Those that do not exist are left out.
        files: Further ones, such as the configuration.
    """
    found = []
    for directory in directories:
        found.append(_permission(directory, is_secret=False))
        found += [
            _permission(path, is_secret=True)
            for pattern in SECRETS
            for path in sorted(directory.glob(pattern))
        ]
    found += [_permission(path, is_secret=False) for path in files]
    return tuple(each for each in dict.fromkeys(found) if each is not None)


def _permission(path: Path, *, is_secret: bool) -> Permission | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return Permission(
        path=str(path),
        is_directory=stat.S_ISDIR(status.st_mode),
        mode=stat.S_IMODE(status.st_mode),
        is_own=status.st_uid == os.getuid(),
        is_writable=os.access(path, os.W_OK),
        is_secret=is_secret,
        is_shielded=not stat.S_IMODE(path.parent.stat().st_mode) & OTHERS_ENTER,
    )


def read_stale(
    directories: Sequence[Path], settings: Settings, stale_servers: Sequence[Path]
) -> StaleState:
    """What earlier servers left behind.

    Args:
        directories: Where to look for damaged files that were put aside.
        settings: Which state directory.
        stale_servers: Files of servers that run no more.

    Raises:
        ConfigError: There is no runtime directory that is ours alone.
    """
    damaged = {str(path) for directory in directories for path in directory.glob(DAMAGED)}
    files = (*stale_servers, *stale_notes(), *leftovers(settings))
    return StaleState(
        files=tuple(str(path) for path in files),
        orphans=tuple(note.pid for note in find_orphans()),
        damaged=tuple(sorted(damaged)),
    )
