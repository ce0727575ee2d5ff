"""How a worker process is started, and how its end is put in words."""

import asyncio
import os
import signal
import sys
from collections.abc import Mapping

from brim.core.plan import Plan

_INHERITED = frozenset(
    {"PATH", "HOME", "USER", "LOGNAME", "LANG", "LANGUAGE", "TZ", "TMPDIR", "VIRTUAL_ENV"}
)
_INHERITED_PREFIXES = ("LC_", "PYTHON", "LD_", "DYLD_", "CUDA_", "XDG_")


def worker_environment(plan: Plan, inherited: Mapping[str, str]) -> dict[str, str]:
    """The worker's environment: what any process needs, and what the plan has chosen.

    Nothing else comes along: a thread setting left in someone's shell would change what the plan
    has measured.
    """
    # An aborting ggml would start a debugger for a backtrace: seconds in which nobody hears of the
    # death, and pages of frames behind the one line that says why.
    quiet = {"GGML_NO_BACKTRACE": "1"}
    kept = {
        name: value
        for name, value in inherited.items()
        if name in _INHERITED or name.startswith(_INHERITED_PREFIXES)
    }
    return kept | plan.environment | quiet


async def start_process(plan: Plan, fd: int) -> asyncio.subprocess.Process:
    """A worker process that inherits `fd`, its end of the socket to this process.

    Raises:
        OSError: The system has no room for it.
    """
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",  # a file in the user's directory must not stand in for a module
        "-m",
        "brim.worker",
        f"--fd={fd}",
        f"--parent={os.getpid()}",
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        pass_fds=(fd,),
        env=worker_environment(plan, os.environ),
    )


def exit_in_words(exit_code: int | None) -> str:
    """How a worker ended; None where it had to be killed after its connection."""
    if exit_code is None:
        return "closed its connection and was killed"
    if exit_code >= 0:
        return f"exited with code {exit_code}"
    if exit_code == -signal.SIGKILL:
        return "was killed by signal 9 (SIGKILL), as the system does when memory runs out"
    try:
        return f"was killed by signal {-exit_code} ({signal.Signals(-exit_code).name})"
    except ValueError:
        return f"was killed by signal {-exit_code}"
