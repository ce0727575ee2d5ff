"""Chooses how one model is loaded, before a byte of it is read, with the reason for each choice.

Pure: the same model, machine and wishes always give the same plan.  Whether the plan fits beside
what is already loaded is the ledger's to say.
"""

import bisect
import functools
from collections.abc import Callable

from brim.core.calibration import HUGE_PAGES, WAIT_POLICIES, Calibration
from brim.core.machine import MachineSpec
from brim.core.memory import MemoryTerms
from brim.core.model import ModelSpec
from brim.core.plan import Objective, Plan
from brim.errors import ConfigError
from brim.planner.measured_options import measured_options
from brim.planner.memory import KV_PADDING_TOKENS, memory_terms, pad_kv_tokens
from brim.planner.mlx_limits import mlx_environment
from brim.planner.mlx_options import (
    MLX_ROWS_REASON,
    THREADS_REASON,
    check_exact_profile,
    kept_as_f16,
    mlx_load_options,
    wires_weights,
)
from brim.planner.options import (
    LoadOptions,
    Wishes,
    exact_options,
    first_that_fits,
    load_options,
)

DEFAULT_CONTEXT_TOKENS = 8192
"""Holds most conversations; models trained on 128 K would otherwise take gigabytes of KV."""

MICRO_BATCH_TOKENS = 512
"""llama.cpp's own default: more rows gain little on a CPU and scratch grows with every row."""

LLAMACPP_ROWS_REASON = "llama.cpp's default; scratch memory grows with every row"

MAX_SEQUENCES = 256
"""llama.cpp's LLAMA_MAX_SEQ; it aborts the process above."""

SHARED_TOKENS_PER_SEQUENCE = 1024
"""A short turn: what each sequence gets of the pool where all are busy at once."""

MAX_POOL_WINDOWS = 4
"""Keeps the pool of a model with a small window in proportion."""

SHARED_LAYER_BYTES = 4 * 1024 * 1024
"""Layers below this are computed on one thread: waking the others costs more than they bring.

A sleeping thread wakes in 5 to 20 us, at each of a layer's 37 or so graph nodes; one core reads
4 MiB in about 0.2 ms.  The demo model (1 MiB a layer) decodes a token in 0.4 ms on one thread and
in 5.4 on two; at 37 MiB a layer they are equal (2-core x86-64 Linux VM, November 2026).
"""

MAX_POOL_OF_RAM = 16
"""A pool larger than one window may cost at most this part (1/16) of RAM."""


def make_plan(
    spec: ModelSpec,
    machine: MachineSpec,
    *,
    engine: str,
    objective: Objective = Objective.DECODE,
    context_tokens: int | None = None,
    max_sequences: int = 1,
    kv_type: str | None = None,
    flash_attention: bool | None = None,
    threads: int | None = None,
    exact_profile: bool = False,
    free_bytes: int | None = None,
    calibration: Calibration | None = None,
    is_draft: bool = False,
    is_only_model: bool = False,
) -> Plan:
    """The plan for one model; None leaves a choice to the planner.

    Args:
        spec: The model.
        machine: Where it will run.
        engine: 'llamacpp', 'mlx' or 'toy'.
        objective: What to favour.
        context_tokens: Longest prompt plus answer of one sequence.
        max_sequences: Most sequences at once.
        kv_type: Type of K and V, or both as 'K/V'.
        flash_attention: Fused attention; needed for a quantised V.
        threads: Threads of the backend.
        exact_profile: Load so that results do not depend on what else is in the batch, to the bit.
        free_bytes: What may be granted to it: load options give way to memory to stay within.
        calibration: What was measured of this machine with this engine.
        is_draft: Whether it drafts for another model, in whose process it will be.
        is_only_model: Whether no other model will be loaded beside it; see `wires_weights`.

    Raises:
        ConfigError: A wish contradicts the model, the machine or another wish.
    """
    context, context_reason = _context(spec, context_tokens)
    if not 1 <= max_sequences <= MAX_SEQUENCES:
        raise ConfigError(
            f"max_sequences is {max_sequences}; it must be 1 to {MAX_SEQUENCES}",
            param="max_sequences",
        )
    wishes = Wishes.of(kv_type, flash_attention)
    measured = (
        measured_options(spec, calibration, objective, context, max_sequences)
        if engine != "mlx" and calibration is not None and calibration.costs
        else []
    )
    candidates = _candidates(spec, machine, engine, objective, wishes, measured, exact_profile)

    def terms_with(
        options: LoadOptions, kv_tokens: int, num_sequences: int = max_sequences
    ) -> MemoryTerms:
        return memory_terms(
            spec,
            engine=engine,
            kv_tokens=kv_tokens,
            max_sequences=num_sequences,
            kv_type_k=options.kv_type_k,
            kv_type_v=options.kv_type_v,
            micro_batch_tokens=MICRO_BATCH_TOKENS,
            flash_attention=options.flash_attention,
            repack_weights=options.repack_weights,
            on_gpu=machine.gpu_limit_bytes is not None,
            is_draft=is_draft,
        )

    def window_bytes(options: LoadOptions) -> int:
        return terms_with(options, pad_kv_tokens(context)).total_bytes

    if engine == "mlx" and objective is Objective.MEMORY:
        candidates = sorted(candidates, key=window_bytes)
    options = first_that_fits(candidates, window_bytes, free_bytes)
    terms = functools.partial(terms_with, options)
    kv_tokens, pool_reason = _pool(context, max_sequences, machine, terms, free_bytes)
    num_threads, num_batch_threads, threads_reason = _threads(
        spec, machine, engine, threads, options
    )
    wire, reasons = False, dict(options.reasons)
    if engine == "mlx":
        is_alone = is_only_model and not is_draft
        wire, reasons["wire_weights"] = wires_weights(
            spec, machine, max_sequences=max_sequences, is_only_model=is_alone
        )
        reasons["kv_type"] += kept_as_f16(
            spec, kv_tokens=kv_tokens, max_sequences=max_sequences, kv_type=options.kv_type_k
        )
        environment, environment_reason = mlx_environment(
            on_gpu=machine.gpu_limit_bytes is not None, wire_weights=wire
        )
    else:
        environment, environment_reason = _environment(
            engine,
            num_batch_threads,
            exact_profile,
            options,
            on_gpu=machine.gpu_limit_bytes is not None,
        )
    return Plan(
        model=spec,
        engine=engine,
        objective=objective,
        context_tokens=context,
        kv_tokens=kv_tokens,
        max_sequences=max_sequences,
        max_batch_tokens=MICRO_BATCH_TOKENS,
        micro_batch_tokens=MICRO_BATCH_TOKENS,
        kv_type_k=options.kv_type_k,
        kv_type_v=options.kv_type_v,
        flash_attention=options.flash_attention,
        repack_weights=options.repack_weights,
        num_threads=num_threads,
        num_batch_threads=num_batch_threads,
        wire_weights=wire,
        environment=environment,
        memory=terms(kv_tokens),
        reasons={
            "context_tokens": context_reason,
            "kv_tokens": pool_reason,
            "max_batch_tokens": "one micro batch a step: a second would only lengthen the stall of "
            "decoding sequences",
            "micro_batch_tokens": MLX_ROWS_REASON if engine == "mlx" else LLAMACPP_ROWS_REASON,
            **reasons,
            "num_threads": threads_reason,
            "environment": environment_reason,
        },
    )


def _candidates(
    spec: ModelSpec,
    machine: MachineSpec,
    engine: str,
    objective: Objective,
    wishes: Wishes,
    measured: list[LoadOptions],
    exact_profile: bool,
) -> list[LoadOptions]:
    """Load options of an engine, best first."""
    if engine == "mlx":
        if exact_profile:
            check_exact_profile(machine)
        return mlx_load_options(spec, objective, wishes)
    if engine == "llamacpp" and exact_profile:
        return [exact_options(spec, wishes)]
    return load_options(spec, machine, engine, objective, wishes, measured)


def _context(spec: ModelSpec, asked: int | None) -> tuple[int, str]:
    """The window and why."""
    trained = spec.trained_context_tokens
    if asked is None:
        if trained <= DEFAULT_CONTEXT_TOKENS:
            return trained, f"the model was trained on {trained} tokens"
        return DEFAULT_CONTEXT_TOKENS, f"the default; the model was trained on {trained} tokens"
    if asked > trained:
        raise ConfigError(
            f"{spec.name} was trained on a context of {trained} tokens; "
            f"ask for at most that instead of {asked}",
            param="context_tokens",
        )
    if asked < 1:
        raise ConfigError(
            f"a context of {asked} tokens holds nothing; give at least 1", param="context_tokens"
        )
    return asked, f"asked for; the model was trained on {trained} tokens"


def _pool(
    context: int,
    max_sequences: int,
    machine: MachineSpec,
    terms: Callable[..., MemoryTerms],
    free_bytes: int | None,
) -> tuple[int, str]:
    """Cells that suit `max_sequences` short conversations and one that fills the window, and why.

    Grows with either and never shrinks, so that asking for more never costs less.  `terms` gives
    the bytes of the model by its number of cells, and of sequences where others are meant.
    """
    each = min(SHARED_TOKENS_PER_SEQUENCE, context)  # no sequence fills more than its window
    sharing = min(max_sequences * each, MAX_POOL_WINDOWS * context)
    window, most = pad_kv_tokens(context), _most_shared_cells(machine, terms)
    shared = pad_kv_tokens(max(context, min(sharing, most)))
    if shared == window:
        if sharing <= window:
            return window, "one full window, which all sequences share"
        return window, (
            f"one full window, shared; {sharing} tokens for {max_sequences} sequences would cost "
            f"over 1/{MAX_POOL_OF_RAM} of RAM"
        )
    if free_bytes is not None and terms(shared).total_bytes > free_bytes:
        return window, (
            f"one full window, shared; there is no room for {shared} tokens for {max_sequences} "
            "sequences"
        )
    if sharing > most:
        return shared, (
            f"what 1/{MAX_POOL_OF_RAM} of RAM holds, for {max_sequences} sequences that share it"
        )
    return shared, (
        f"{each} tokens for each of {max_sequences} sequences, at most "
        f"{MAX_POOL_WINDOWS} windows; all share them, so that one may fill its window"
    )


def _most_shared_cells(machine: MachineSpec, terms: Callable[..., MemoryTerms]) -> int:
    """Cells that `MAX_POOL_OF_RAM` pays for, by what cells cost between two usual pools."""
    few, many = 4096, 8192
    cell_bytes = (terms(many, 1).total_bytes - terms(few, 1).total_bytes) / (many - few)
    cells = int(machine.ram_bytes / MAX_POOL_OF_RAM / max(1.0, cell_bytes))
    return cells // KV_PADDING_TOKENS * KV_PADDING_TOKENS


def _threads(
    spec: ModelSpec, machine: MachineSpec, engine: str, asked: int | None, options: LoadOptions
) -> tuple[int, int, str]:
    """Threads for one row, threads for several, and why.

    On a CPU the most that the engine takes: it makes do with fewer while other programs are busy.
    Source: 1.24 B Q4_K_M on a 2-core x86-64 Linux VM, November 2026: 31 ms a token on one thread,
    22 on two that spin while they wait for each other.  Where a GPU computes, threads wait for it,
    and a core is left to everything else.
    """
    if engine == "mlx":
        if asked is not None:
            raise ConfigError(f"{THREADS_REASON}; leave threads out", param="threads")
        return 1, 1, THREADS_REASON
    if asked is not None:
        if asked < 1:
            raise ConfigError(f"{asked} threads cannot compute; give at least 1", param="threads")
        return asked, asked, "asked for"
    if spec.weights_bytes < SHARED_LAYER_BYTES * spec.num_layers:
        return 1, 1, "layers this small are done before a second thread wakes up"
    if options.num_threads is not None and options.num_batch_threads is not None:
        return options.num_threads, options.num_batch_threads, options.reasons["num_threads"]
    num_cores = machine.performance_cores
    if machine.gpu_limit_bytes is not None:
        reason = "one for each performance core; a single row leaves one core to everything else"
        return max(1, num_cores - 1), num_cores, reason
    reason = "one for each performance core; a single row takes fewer while other programs are busy"
    return num_cores, num_cores, reason


def _environment(
    engine: str, num_threads: int, exact_profile: bool, options: LoadOptions, *, on_gpu: bool
) -> tuple[dict[str, str], str]:
    """What must stand in the worker's environment before its backend starts."""
    if engine != "llamacpp":
        return {}, f"the {engine} engine has no OpenMP threads"
    environment = WAIT_POLICIES[options.wait_policy] | {"OMP_NUM_THREADS": str(num_threads)}
    if not on_gpu:
        environment |= HUGE_PAGES
    reason = options.reasons.get("environment") or (
        "a GPU computes; threads that wait for it sleep"
        if options.wait_policy == "passive"
        else "threads spin for some 50 us before they sleep: longer than the waits of an idle "
        "machine, shorter than a busy program's turn on their core; huge pages gain 5 %"
    )
    if exact_profile:
        environment["GGML_CPU_TILED_MM"] = "0"
        reason += "; tiled matrix products round differently from 8 rows up"
    return environment, reason


def largest_context(plan: Plan, machine: MachineSpec, budget_bytes: int) -> int | None:
    """The longest window for which this model can be planned within `budget_bytes`.

    A multiple of 256 below the plan's own, with a pool of one window where more has no room, and
    everything else as it is; None where none fits.
    """

    def total_bytes(context: int) -> int:
        return memory_terms(
            plan.model,
            engine=plan.engine,
            kv_tokens=pad_kv_tokens(context),
            max_sequences=plan.max_sequences,
            kv_type_k=plan.kv_type_k,
            kv_type_v=plan.kv_type_v,
            micro_batch_tokens=plan.micro_batch_tokens,
            flash_attention=plan.flash_attention,
            repack_weights=plan.repack_weights,
            on_gpu=machine.gpu_limit_bytes is not None,
        ).total_bytes

    shorter = range(KV_PADDING_TOKENS, plan.context_tokens, KV_PADDING_TOKENS)
    # More context never costs less, so those that fit come first.
    num_fitting = bisect.bisect_right(shorter, budget_bytes, key=total_bytes)
    return shorter[num_fitting - 1] if num_fitting else None
