"""What one process holds, by the system's own account."""

from brim.errors import ConfigError
from brim.machine.process_memory import ProcessMemory
from brim.machine.reading import machine_at_hand


def process_memory(pid: int) -> ProcessMemory | None:
    """What a process holds; None where it is gone, not ours to read, or the system does not say."""
    try:
        return machine_at_hand().process_memory(pid)
    except ConfigError:  # neither Linux nor macOS
        return None


def resident_bytes(pid: int) -> int | None:
    """What a process has in RAM, mapped weights included; None where the system does not say.

    Cheap enough to be asked every few seconds, whatever the process's size.
    """
    try:
        return machine_at_hand().resident_bytes(pid)
    except ConfigError:  # neither Linux nor macOS
        return None
