"""Chooses KV type, flash attention and repacking together: they decide between speed and memory.

For llama.cpp and the toy engine; MLX's choices are in `mlx_options`.
"""

from collections.abc import Callable, Sequence

import msgspec

from brim.core.machine import MachineSpec
from brim.core.model import ModelSpec
from brim.core.plan import Objective
from brim.errors import ConfigError
from brim.planner.memory import KV_TYPES, check_kv_type, is_quantised

FRUGAL_KV_TYPE = "q8_0"
"""What a KV cache shrinks to where memory needs it: half of f16 at no cost in quality that the
published tables show; anything smaller has to be asked for."""

SPINNING = "spin3000"
"""How threads wait for each other on a CPU: sleeping at each wait costs a third of the rate of an
idle machine; beside busy programs the engine takes fewer threads (`engine.llamacpp.threads`)."""

CPU_KV_REASON = "a quantised V cache costs up to half of a CPU's decode speed"

CPU_FLASH_REASON = (
    "a CPU reads long prompts in two thirds of the time and passes over the cells of others; "
    "costs 5 % of decode at 1,000 tokens"
)
"""Source: 1.24 B Q4_K_M, 2-core x86-64 VM, November 2026: 1,400 tokens in 7.2 s, without in 11.7;
44.8 and 38.8 tok/s beside 0 and 6,000 cells of others, without 35.2 and 20.9; 37.3 tok/s at 1,000
tokens of its own, without 39.2."""


class LoadOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The options that decide between speed and memory, chosen together, with one reason each."""

    kv_type_k: str
    kv_type_v: str
    flash_attention: bool
    repack_weights: bool
    num_threads: int | None = None
    """Threads of a step with one row; None leaves them to the planner's rules."""
    num_batch_threads: int | None = None
    wait_policy: str = "passive"
    """A name in `core.calibration.WAIT_POLICIES`."""
    reasons: dict[str, str]


class Wishes(msgspec.Struct, frozen=True, kw_only=True):
    """What a user decided; None leaves a choice to the planner."""

    kv_type_k: str | None = None
    kv_type_v: str | None = None
    flash_attention: bool | None = None

    @classmethod
    def of(cls, kv_type: str | None, flash_attention: bool | None) -> "Wishes":
        """From one KV type for both, or two as 'K/V'.

        Raises:
            ConfigError: More than two types.

        Example:
            >>> Wishes.of("q8_0/f16", None).kv_type_v
            'f16'
        """
        parts = kv_type.split("/") if kv_type is not None else [None]
        if len(parts) > 2:
            raise ConfigError(
                f"'{kv_type:.40}' names more than two KV types; give one, or K/V as in q8_0/f16",
                param="kv_type",
            )
        return cls(kv_type_k=parts[0], kv_type_v=parts[-1], flash_attention=flash_attention)


def load_options(
    spec: ModelSpec,
    machine: MachineSpec,
    engine: str,
    objective: Objective,
    wishes: Wishes,
    measured: Sequence[LoadOptions] = (),
) -> list[LoadOptions]:
    """KV type, flash attention and repacking for the objective: best first, then ever smaller.

    Every candidate honours the wishes; the later ones are for machines where the first does not
    fit.

    Args:
        spec: The model.
        machine: Where it will run.
        engine: 'llamacpp' or 'toy'.
        objective: What to favour.
        wishes: What the user decided.
        measured: Candidates by measurement of this machine, which go before the rules.

    Raises:
        ConfigError: A wish contradicts the model or another wish.
    """
    preferred = preferred_options(machine, engine, objective)
    frugal = preferred_options(machine, engine, Objective.MEMORY)
    needed = "memory needs it: "
    candidates = measured or [
        preferred,
        msgspec.structs.replace(
            preferred,
            repack_weights=False,
            reasons=preferred.reasons
            | {"repack_weights": needed + frugal.reasons["repack_weights"]},
        ),
        msgspec.structs.replace(
            frugal, reasons={name: needed + why for name, why in frugal.reasons.items()}
        ),
    ]
    return unique([with_wishes(spec, options, wishes) for options in candidates])


def unique(candidates: Sequence[LoadOptions]) -> list[LoadOptions]:
    """The candidates without those that load just as an earlier one does."""
    seen: list[LoadOptions] = []
    for options in candidates:
        if all(_settings(options) != _settings(other) for other in seen):
            seen.append(options)
    return seen


def _settings(options: LoadOptions) -> tuple[str, str, bool, bool]:
    return (
        options.kv_type_k,
        options.kv_type_v,
        options.flash_attention,
        options.repack_weights,
    )


def first_that_fits(
    candidates: Sequence[LoadOptions],
    total_bytes: Callable[[LoadOptions], int],
    free_bytes: int | None,
) -> LoadOptions:
    """The best candidate within `free_bytes`; the best of all where none fits, or none is asked.

    A plan that cannot fit is best explained by what was really wanted: the ways to make it fit
    then start from there.
    """
    if free_bytes is not None:
        for options in candidates:
            if total_bytes(options) <= free_bytes:
                return options
    return candidates[0]


def with_wishes(spec: ModelSpec, options: LoadOptions, wishes: Wishes) -> LoadOptions:
    """The options with what the user decided in their place, and what that entails.

    Raises:
        ConfigError: A wish contradicts the model or another wish.
    """
    reasons = dict(options.reasons)
    key, value = options.kv_type_k, options.kv_type_v
    if wishes.kv_type_k is not None and wishes.kv_type_v is not None:
        check_kv_type(spec, wishes.kv_type_k)
        check_kv_type(spec, wishes.kv_type_v)
        key, value, reasons["kv_type"] = wishes.kv_type_k, wishes.kv_type_v, "asked for"
    elif not suits(spec, key) or not suits(spec, value):
        key = value = "f16"
        reasons["kv_type"] = "blocks of 32 values do not divide the model's heads"
    flash = options.flash_attention
    if wishes.flash_attention is not None:
        flash, reasons["flash_attention"] = wishes.flash_attention, "asked for"
    if is_quantised(value) and not flash:
        if wishes.flash_attention is False and wishes.kv_type_v is not None:
            raise ConfigError(
                f"a quantised V cache ({value}) needs flash attention; "
                "turn it on, or use f16 for the KV cache",
                param="flash_attention",
            )
        if wishes.flash_attention is False:
            key = value = "f16"
            reasons["kv_type"] = "a quantised V needs flash attention, which is off"
        else:
            flash = True
    if is_quantised(value) and wishes.flash_attention is None:
        reasons["flash_attention"] = "a quantised V cache needs it"
    return msgspec.structs.replace(
        options, kv_type_k=key, kv_type_v=value, flash_attention=flash, reasons=reasons
    )


def suits(spec: ModelSpec, kv_type: str) -> bool:
    """Whether the blocks of a KV type divide the model's heads."""
    num_values = KV_TYPES[kv_type].num_values
    return spec.key_dim % num_values == 0 and spec.value_dim % num_values == 0


def preferred_options(machine: MachineSpec, engine: str, objective: Objective) -> LoadOptions:
    """What suits the objective where nothing was measured here and nobody wishes otherwise."""
    if engine == "toy":
        reason = "the toy engine has no such option"
        return LoadOptions(
            kv_type_k="f16", kv_type_v="f16", flash_attention=False, repack_weights=False,
            reasons=dict.fromkeys(("kv_type", "flash_attention", "repack_weights"), reason),
        )  # fmt: skip
    if machine.gpu_limit_bytes is not None or objective is Objective.MEMORY:
        return _frugal_options(on_gpu=machine.gpu_limit_bytes is not None)
    if objective is Objective.PREFILL:
        return LoadOptions(
            kv_type_k="f16", kv_type_v="f16", flash_attention=True, repack_weights=False,
            wait_policy=SPINNING,
            reasons={
                "kv_type": CPU_KV_REASON,
                "flash_attention": CPU_FLASH_REASON,
                "repack_weights": "rearranged weights cost a third of prefill speed here",
            },
        )  # fmt: skip
    return LoadOptions(
        kv_type_k="f16", kv_type_v="f16", flash_attention=True, repack_weights=True,
        wait_policy=SPINNING,
        reasons={
            "kv_type": CPU_KV_REASON,
            "flash_attention": CPU_FLASH_REASON,
            "repack_weights": "decodes up to 13 % faster, for a second copy of some weights",
        },
    )  # fmt: skip


def _frugal_options(*, on_gpu: bool) -> LoadOptions:
    """Half the KV and no second copy of weights (figures: x86, 1.24 B Q4_K_M)."""
    return LoadOptions(
        kv_type_k=FRUGAL_KV_TYPE, kv_type_v=FRUGAL_KV_TYPE,
        flash_attention=True, repack_weights=False,
        wait_policy="passive" if on_gpu else SPINNING,
        reasons={
            "kv_type": "half the bytes of f16" + (" at GPU speed" if on_gpu else ""),
            "flash_attention": "a quantised V cache needs it",
            "repack_weights": "the GPU reads the mapped file"
            if on_gpu
            else "weights stay mapped file pages, which the system may drop and read again",
        },
    )  # fmt: skip


def exact_options(spec: ModelSpec, wishes: Wishes) -> LoadOptions:
    """The one combination whose results are the same to the bit whatever the batch holds."""
    others = {wishes.kv_type_k, wishes.kv_type_v} - {None, "q8_0"}
    if others or wishes.flash_attention is False:
        raise ConfigError(
            "the exact profile is q8_0 KV with flash attention; leave other wishes out",
            param="exact_profile",
        )
    check_kv_type(spec, "q8_0")
    reason = "the exact profile: other kernels change with the number of rows"
    return LoadOptions(
        kv_type_k="q8_0", kv_type_v="q8_0", flash_attention=True, repack_weights=False,
        wait_policy=SPINNING,
        reasons=dict.fromkeys(("kv_type", "flash_attention", "repack_weights"), reason),
    )  # fmt: skip
