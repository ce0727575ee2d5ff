"""Which processes still run, and what they started: what the book asks of the system."""

SAME_START_S = 2.0
"""The kernel counts ticks since boot; turned into a time of day it may move with the clock."""


def start_time(pid: int) -> float | None:
    """When a process began (Unix seconds); None where it has ended or only its exit code is left.

    A process id may have been given out again; together with this it names one process for good.
    """
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.Error:
        return None


def is_running(pid: int, started_unix_s: float) -> bool:
    """Whether the very process that began then still runs, rather than another with its id."""
    started = start_time(pid)
    return started is not None and abs(started - started_unix_s) < SAME_START_S


def process_tree(pid: int) -> list[int]:
    """A process and everything that it started; empty where it is gone or not ours to see."""
    import psutil

    try:
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.Error:
        return []
