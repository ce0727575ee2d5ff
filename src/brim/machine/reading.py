"""One reading of the machine, whichever system it runs."""

import os
import platform

from brim.core.machine import MachineSpec
from brim.errors import ConfigError


def read_machine() -> MachineSpec:
    """Memory and processors now; what this process and its children hold is not 'others'.

    Takes about a millisecond for each child, so that it can be asked before every grant.

    Raises:
        ConfigError: The system is neither Linux nor macOS.
    """
    if platform.system() == "Linux":
        from brim.machine import linux

        return linux.read_linux(own_pids=own_pids())
    if platform.system() == "Darwin":
        from brim.machine import macos

        return macos.read_macos(own_pids=own_pids())
    raise ConfigError(f"brim runs on Linux and macOS, not on {platform.system()}")


def own_pids() -> list[int]:
    """This process and everything that it started."""
    import psutil

    try:
        children = psutil.Process().children(recursive=True)
    except psutil.Error:
        children = []
    return [os.getpid(), *(child.pid for child in children)]
