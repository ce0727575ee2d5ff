"""What llama.cpp says through its log callback: buffer sizes at load, reasons at failure.

The callback is global to the process and costs nothing while decoding, where nothing is logged.
"""

import re
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from brim.core.memory import Footprint
from brim.engine.llamacpp.binding import lib

_LEVEL_DEBUG, _LEVEL_WARN, _LEVEL_ERROR, _LEVEL_CONTINUED = 1, 3, 4, 5

_MIB = 1024 * 1024

# "load_tensors:   CPU_Mapped model buffer size =    11.01 MiB"
# "llama_kv_cache:        CPU KV buffer size =    24.00 MiB"
# "sched_reserve:        CPU compute buffer size =    83.01 MiB"
# "llama_context:        CPU  output buffer size =     0.25 MiB"
_BUFFER_SIZE = re.compile(
    r":\s+(?P<device>\S+)\s+(?P<kind>model|KV|RS|compute|output) buffer size\s*=\s*"
    r"(?P<mib>[0-9.]+) MiB"
)

# Lines that only repeat that something failed, without the reason.
_EMPTY_REASONS = ("failed to load model", "model cannot be NULL", "failed to decode")

_active: list[list[str]] = []
_recent_errors: deque[str] = deque(maxlen=20)
_partial = ""


@lib.llama_log_callback  # type: ignore[untyped-decorator]
def _on_log(level: int, text: bytes, _user_data: Any) -> None:
    global _partial
    if level == _LEVEL_DEBUG or not text:
        return
    _partial = _partial + text.decode("utf-8", "replace")
    while "\n" in _partial:
        line, _partial = _partial.split("\n", 1)
        if level in (_LEVEL_WARN, _LEVEL_ERROR):
            _recent_errors.append(line.strip())
        for lines in _active:
            lines.append(line)


def install() -> None:
    """Route llama.cpp's log here instead of stderr; safe to call again."""
    lib.llama_log_set(_on_log, None)


@contextmanager
def captured() -> Iterator[list[str]]:
    """Lines logged inside the block, filled as they come."""
    lines: list[str] = []
    _recent_errors.clear()
    _active.append(lines)
    try:
        yield lines
    finally:
        _active.remove(lines)


def forget_errors() -> None:
    """Start afresh, so that `last_error` can only be of what follows."""
    _recent_errors.clear()


def last_error() -> str:
    """The most telling recent error line, or an empty string."""
    reasons = [line for line in _recent_errors if not any(line.endswith(e) for e in _EMPTY_REASONS)]
    return reasons[-1] if reasons else (_recent_errors[-1] if _recent_errors else "")


def footprint_from(lines: list[str]) -> Footprint:
    """Add up the buffer sizes in load and context lines.

    llama.cpp prints MiB with two decimals, so each term is exact to about 10 KB a buffer.
    """
    weights = mapped = kv = compute = output = 0
    for line in lines:
        match = _BUFFER_SIZE.search(line)
        if match is None:
            continue
        num_bytes = round(float(match["mib"]) * _MIB)
        kind = match["kind"]
        if kind == "model":
            weights += num_bytes
            mapped += num_bytes if match["device"].endswith("_Mapped") else 0
        elif kind in ("KV", "RS"):
            kv += num_bytes
        elif kind == "compute":
            compute += num_bytes
        else:
            output += num_bytes
    return Footprint(
        weights_bytes=weights,
        mapped_weights_bytes=mapped,
        kv_bytes=kv,
        compute_bytes=compute,
        output_bytes=output,
    )
