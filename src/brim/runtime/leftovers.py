"""Files of writes that were cut off: a process was killed between making one and renaming it.

The prefix cache collects its own.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from brim.config import places
from brim.config.tree import Settings
from brim.machine.calibrations import calibrations_directory
from brim.telemetry.events import log_event

OLD_S = 86_400.0
"""A write takes milliseconds, the longest calibration an hour: what is a day old was cut off."""


def leftovers(settings: Settings, *, now_unix_s: float | None = None) -> list[Path]:
    """Temporary files and directories of ours that nobody will rename any more.

    Args:
        settings: Which state directory.
        now_unix_s: The time; now unless given.

    Raises:
        ConfigError: There is no runtime directory that is ours alone.
    """
    now = time.time() if now_unix_s is None else now_unix_s
    return [path for path in _temporary(settings) if _is_old_and_ours(path, now)]


def remove_leftovers(settings: Settings) -> int:
    """Remove them; how many there were.

    Raises:
        ConfigError: There is no runtime directory that is ours alone.
    """
    num_removed = 0
    for path in leftovers(settings):
        with contextlib.suppress(FileNotFoundError):
            try:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
                num_removed += 1
            except PermissionError as exc:
                log_event("leftover_stays", path=path, reason=exc)
    return num_removed


def _temporary(settings: Settings) -> Iterator[Path]:
    """By the names that our writers give: `state`, `orphans`, `calibrations`, `calibrate`."""
    import platformdirs

    runtime = places.runtime_directory()
    for directory in dict.fromkeys((places.state_path(settings), runtime, runtime / "workers")):
        yield from sorted(directory.glob("*.new"))
    yield from sorted(calibrations_directory().glob(".new-*"))
    cache = platformdirs.user_cache_path("brim", appauthor=False)
    yield from sorted(cache.glob("calibrate-*"))


def _is_old_and_ours(path: Path, now_unix_s: float) -> bool:
    try:
        status = path.lstat()
    except OSError:
        return False
    return status.st_uid == os.getuid() and now_unix_s - status.st_mtime > OLD_S
