"""Where brim keeps what outlives a process: state for good, and who runs until the next boot."""

import warnings
from pathlib import Path

from brim.config.tree import Settings
from brim.errors import ConfigError

OWNER_ONLY = 0o700
"""Hashes of keys and who used what are nobody else's business."""


def state_path(settings: Settings) -> Path:
    """The directory that `server.state_directory` names, or the platform's; nothing is made."""
    if settings.server.state_directory:
        return Path(settings.server.state_directory).expanduser().absolute()
    import platformdirs

    return platformdirs.user_state_path("brim", appauthor=False)


def state_directory(settings: Settings) -> Path:
    """Where one server keeps apps, usage and events; made for its owner alone where it is missing.

    Raises:
        ConfigError: It cannot be made.
    """
    path = state_path(settings)
    try:
        path.mkdir(mode=OWNER_ONLY, parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError(
            f"the state directory {path} cannot be made ({exc.strerror}); name another one with "
            "--state-dir, server.state_directory or BRIM_SERVER_STATE_DIRECTORY",
            param="server.state_directory",
        ) from exc
    return path


def runtime_directory() -> Path:
    """Where running servers and workers of this user are noted; nothing is made.

    Raises:
        ConfigError: There is no directory that is ours alone.
    """
    import platformdirs

    with warnings.catch_warnings():
        # It warns where XDG_RUNTIME_DIR is open to others, and then takes another directory.
        warnings.simplefilter("ignore")
        try:
            return platformdirs.user_runtime_path("brim", appauthor=False)
        except OSError as exc:
            raise ConfigError(f"no place for the state of running servers: {exc}") from exc
