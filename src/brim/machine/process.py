"""What one process holds, by the system's own account."""

import platform

from brim.machine.process_memory import ProcessMemory


def process_memory(pid: int) -> ProcessMemory | None:
    """What a process holds; None where it is gone, not ours to read, or the system does not say."""
    if platform.system() == "Linux":
        from brim.machine import linux

        return linux.process_memory(pid)
    if platform.system() == "Darwin":
        from brim.machine import macos

        return macos.process_memory(pid)
    return None


def resident_bytes(pid: int) -> int | None:
    """What a process has in RAM, mapped weights included; None where the system does not say.

    Cheap enough to be asked every few seconds, whatever the process's size.
    """
    if platform.system() == "Linux":
        from brim.machine import linux

        return linux.resident_bytes(pid)
    memory = process_memory(pid)
    return None if memory is None else memory.resident_bytes
