"""Asks llama.cpp itself what a plan would take, without loading a weight.

In a child process, because llama.cpp aborts on what it does not expect: it reads the header, makes
every tensor without memory, and lays out its caches and its largest graph.  What it says there is
compared with the plan; whatever differs is a defect of the planner, and is said as one.
"""

import ctypes
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import msgspec

from brim.core.plan import Plan
from brim.errors import EngineError, ModelFileError

TIMEOUT_S = 120
"""A dry run of a 70 B model takes under a second; the rest is for a machine that swaps."""

TOLERANCE_BYTES = 4 * 1024 * 1024
TOLERANCE_PERCENT = 5
"""A compute buffer may differ by the larger of the two before it counts as a defect."""

LOG_RESOLUTION_BYTES = 10_486
"""llama.cpp prints MiB with two decimals."""

_OPTIONS = (
    "kv_tokens",
    "max_batch_tokens",
    "micro_batch_tokens",
    "max_sequences",
    "kv_type_k",
    "kv_type_v",
    "flash_attention",
)
"""Of a plan: what decides the sizes."""

_LOAD_MODE_NONE = 0
"""Of llama.h: neither mapped nor locked."""

_MIB = 1024 * 1024
_CACHE_SIZE = re.compile(
    r"size = +[0-9.]+ MiB \( *(?P<cells>\d+) cells, .*?, [KR] \((?P<key_type>\w+)\): +"
    r"(?P<key>[0-9.]+) MiB, [VS] \((?P<value_type>\w+)\): +(?P<value>[0-9.]+) MiB"
)
_BUFFER_SIZE = re.compile(r" +(?P<kind>compute|output) buffer size = +(?P<mib>[0-9.]+) MiB")


class CacheBytes(msgspec.Struct, frozen=True, kw_only=True):
    """One cache as llama.cpp says it: the pool, its windows, or the recurrent states."""

    cells: int
    key_type: str
    value_type: str
    key_bytes: int
    value_bytes: int


class DryRun(msgspec.Struct, frozen=True, kw_only=True):
    """What llama.cpp would allocate; all but weights to 10 KB, the resolution of its log."""

    weights_bytes: int
    """All tensors that the architecture uses, to the byte."""
    caches: tuple[CacheBytes, ...]
    compute_bytes: int
    output_bytes: int

    @property
    def kv_bytes(self) -> int:
        """All caches together."""
        return sum(cache.key_bytes + cache.value_bytes for cache in self.caches)


class _Answer(msgspec.Struct):
    """What the child prints."""

    found: list[DryRun] = []
    error: str | None = None


def dry_run(plan: Plan, *, full_windows: bool = True) -> DryRun:
    """What llama.cpp would allocate for a plan, asked in a child process.

    Args:
        plan: For the llama.cpp engine, of a file that is here (its header suffices).
        full_windows: As in `planner.memory.memory_terms`.

    Raises:
        ModelFileError: llama.cpp cannot read the file, or makes no context of it.
        EngineError: The child died, or said nothing that could be understood.
    """
    return dry_runs([plan], full_windows=full_windows)[0]


def dry_runs(plans: Sequence[Plan], *, full_windows: bool = True) -> list[DryRun]:
    """The same for several plans of one model, whose header is read once.

    Raises:
        ModelFileError: llama.cpp cannot read the file, or makes no context of it.
        EngineError: The child died, or said nothing that could be understood.
    """
    model = plans[0].model
    assert all(plan.model.paths == model.paths for plan in plans)
    request = {
        "paths": model.paths,
        "full_windows": full_windows,
        "contexts": [{name: getattr(plan, name) for name in _OPTIONS} for plan in plans],
    }
    try:
        child = subprocess.run(
            # A file in the user's directory must not stand in for a module.
            [sys.executable, "-P", "-m", "brim.engine.llamacpp.dry_run"],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise EngineError(f"llama.cpp: a dry run did not end within {TIMEOUT_S} s") from None
    if child.returncode != 0:
        lines = child.stderr.strip().splitlines()
        raise EngineError(
            f"llama.cpp: the dry run of {model.name} ended with {child.returncode}"
            + (f": {lines[-1]:.200}" if lines else "")
        )
    try:
        answer = msgspec.json.decode(child.stdout, type=_Answer)
    except msgspec.MsgspecError as error:
        raise EngineError(
            f"llama.cpp: the dry run of {model.name} gave no answer that can be read: {error}"
        ) from error
    if answer.error is not None:
        raise ModelFileError(f"{model.paths[0]}: llama.cpp refuses it: {answer.error}")
    return answer.found


def disagreements(plan: Plan, found: DryRun) -> list[str]:
    """Where llama.cpp's own figures and the plan's differ: one sentence each, none if all is well.

    Weights must agree to the byte, KV to the log's resolution, scratch memory within
    `TOLERANCE_PERCENT` or `TOLERANCE_BYTES`, whichever is larger.
    """
    terms = plan.memory
    scratch = found.compute_bytes + found.output_bytes
    exact = LOG_RESOLUTION_BYTES
    allowed = {
        "weights": (terms.weights_bytes, found.weights_bytes, 0),
        # Each cache's K and V are rounded on their own.
        "kv": (terms.kv_bytes, found.kv_bytes, exact * (1 + 2 * len(found.caches))),
        "compute": (
            terms.compute_bytes,
            scratch,
            max(TOLERANCE_BYTES, scratch * TOLERANCE_PERCENT // 100),
        ),
    }
    return [
        f"defect of the planner: the {name} term of {plan.model.name} is planned as "
        f"{planned / _MIB:.2f} MiB, llama.cpp says {real / _MIB:.2f} MiB; please report it"
        for name, (planned, real, tolerance) in allowed.items()
        if abs(planned - real) > tolerance
    ]


def parse_log(lines: Sequence[str], weights_bytes: int) -> DryRun:
    """The figures in what llama.cpp logged of one context."""
    sizes = {"compute": 0, "output": 0}
    caches = []
    for line in lines:
        if match := _BUFFER_SIZE.search(line):
            sizes[match["kind"]] += _bytes_of(match["mib"])
        elif match := _CACHE_SIZE.search(line):
            caches.append(
                CacheBytes(
                    cells=int(match["cells"]),
                    key_type=match["key_type"],
                    value_type=match["value_type"],
                    key_bytes=_bytes_of(match["key"]),
                    value_bytes=_bytes_of(match["value"]),
                )
            )
    return DryRun(
        weights_bytes=weights_bytes,
        caches=tuple(caches),
        compute_bytes=sizes["compute"],
        output_bytes=sizes["output"],
    )


def _bytes_of(mib: str) -> int:
    return round(float(mib) * _MIB)


# --- the child -----------------------------------------------------------------------------------


def _run_child() -> None:
    from brim.engine.llamacpp import binding, log

    request = json.load(sys.stdin)
    binding.check_layout()
    log.install()
    binding.lib.llama_backend_init()
    model = _load(request["paths"], binding.lib)
    weights_bytes = binding.lib.llama_model_size(model) if model else 0
    answer = _Answer()
    for options in request["contexts"] if model else ():
        with log.captured() as lines:
            params = _context_params(options, request["full_windows"], binding)
            context = binding.lib.llama_init_from_model(model, params)
        if not context:
            model = None
            break
        binding.lib.llama_free(context)
        answer.found.append(parse_log(lines, weights_bytes))
    if not model:
        answer = _Answer(error=log.last_error() or "it says no reason")
    sys.stdout.write(msgspec.json.encode(answer).decode())


def _load(paths: Sequence[str], lib: Any) -> Any:
    """The model without memory for its tensors; None where llama.cpp refuses it."""
    params = lib.llama_model_default_params()
    params.no_alloc = True
    # With a mapping, llama.cpp aborts on what it did not allocate.
    params.load_mode = _LOAD_MODE_NONE
    params.use_extra_bufts = False
    encoded = [path.encode() for path in paths]
    if len(encoded) == 1:
        return lib.llama_model_load_from_file(encoded[0], params)
    array = (ctypes.c_char_p * len(encoded))(*encoded)
    return lib.llama_model_load_from_splits(array, len(encoded), params)


def _context_params(options: dict[str, Any], full_windows: bool, binding: Any) -> Any:
    """As the engine sets them."""
    params = binding.lib.llama_context_default_params()
    params.n_ctx = options["kv_tokens"]
    params.n_batch = options["max_batch_tokens"]
    params.n_ubatch = options["micro_batch_tokens"]
    params.n_seq_max = options["max_sequences"]
    params.n_outputs_max = options["max_sequences"]
    params.flash_attn_type = binding.FLASH_ATTENTION[options["flash_attention"]]
    params.type_k = binding.GGML_TYPES[options["kv_type_k"]]
    params.type_v = binding.GGML_TYPES[options["kv_type_v"]]
    params.kv_unified = True
    params.swa_full = full_windows
    return params


if __name__ == "__main__":
    _run_child()
