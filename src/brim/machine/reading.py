"""The machine at hand, whichever system it runs."""

import os
import platform

from brim.core.machine import Conditions, MachineSpec
from brim.errors import ConfigError
from brim.machine.interface import Machine


def machine_at_hand() -> Machine:
    """The machine that runs this process.

    Raises:
        ConfigError: The system is neither Linux nor macOS.
    """
    if platform.system() == "Linux":
        from brim.machine.linux_machine import LinuxMachine

        return LinuxMachine(own_pids=own_pids)
    if platform.system() == "Darwin":
        from brim.machine.macos import MacosMachine

        return MacosMachine(own_pids=own_pids)
    raise ConfigError(f"brim runs on Linux and macOS, not on {platform.system()}")


def read_machine() -> MachineSpec:
    """Memory and processors now; what this process and its children hold is not 'others'.

    Takes about a millisecond for each child, so that it can be asked before every grant.

    Raises:
        ConfigError: The system is neither Linux nor macOS, or does not say what is in use.
    """
    return machine_at_hand().read_machine()


def read_conditions() -> Conditions:
    """Pressure, swap, heat, power and the load of others now; takes about a quarter of a second.

    Raises:
        ConfigError: The system is neither Linux nor macOS.
    """
    return machine_at_hand().read_conditions()


def own_pids() -> list[int]:
    """This process and everything that it started."""
    import psutil

    try:
        children = psutil.Process().children(recursive=True)
    except psutil.Error:
        children = []
    return [os.getpid(), *(child.pid for child in children)]
