"""How the engines' backends were built, asked in children, and what the processor could do."""

import platform
import subprocess
import sys
from pathlib import Path

import msgspec

from brim.doctor.facts import Build, Builds
from brim.engine.factory import available_engines
from brim.machine.cgroup import read_text
from brim.machine.macos_calls import NativeCalls
from brim.machine.macos_formats import parse_sysctl_int

CHILD_LIMIT_S = 8.0
"""A backend starts in a tenth of a second, from a cold disk in a few; a longer one hangs."""

MAX_QUOTED_CHARS = 200

ARM_KEYS = {"asimddp": "hw.optional.arm.FEAT_DotProd", "i8mm": "hw.optional.arm.FEAT_I8MM"}
"""Linux's names of ARM's instruction sets -> macOS's keys."""


class _Said(msgspec.Struct, frozen=True):
    version: str
    has_gpu: bool
    features: tuple[str, ...] = ()


def read_build(engine: str) -> Builds:
    """How one engine was built; none where it is not installed."""
    return Builds(
        builds=(_asked(engine),) if engine in available_engines() else (),
        system=sys.platform,
        architecture=platform.machine(),
        cpu_features=_cpu_features(),
        has_gpu=_has_gpu(),
        is_translated=bool(parse_sysctl_int(NativeCalls().sysctl("sysctl.proc_translated"))),
    )


def _asked(engine: str) -> Build:
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", f"brim.engine.{engine}.build"],
            stdin=subprocess.DEVNULL, capture_output=True, timeout=CHILD_LIMIT_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Build(engine=engine, problem=f"it does not start within {CHILD_LIMIT_S:.0f} s")
    except OSError as exc:
        return Build(engine=engine, problem=str(exc))
    # Backends may print lines of their own before.
    last = done.stdout.splitlines()[-1] if done.stdout else b""
    try:
        said = msgspec.json.decode(last, type=_Said)
    except msgspec.MsgspecError:
        words = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["it says nothing"]
        return Build(engine=engine, problem=words[-1][:MAX_QUOTED_CHARS])
    return Build(engine=engine, version=said.version, has_gpu=said.has_gpu, features=said.features)


def _cpu_features() -> tuple[str, ...]:
    """What the processor can do, in Linux's words."""
    if platform.system() == "Darwin":
        calls = NativeCalls()
        found = [n for n, key in ARM_KEYS.items() if parse_sysctl_int(calls.sysctl(key))]
        return tuple(found)
    return parse_cpuinfo(read_text(Path("/proc/cpuinfo")))


def parse_cpuinfo(text: str) -> tuple[str, ...]:
    r"""The flags of the first processor.

    Example:
        >>> parse_cpuinfo("processor\t: 0\nflags\t\t: fpu avx2 avx512f\n")
        ('fpu', 'avx2', 'avx512f')
    """
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return tuple(rest.split())
    return ()


def _has_gpu() -> bool:
    """Whether there is a GPU that shares the memory, or that llama.cpp could use."""
    if platform.system() == "Darwin":
        return platform.machine() == "arm64"
    return any(Path(path).exists() for path in ("/proc/driver/nvidia/version", "/dev/kfd"))
