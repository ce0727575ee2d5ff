"""Chooses KV type, flash attention and repacking together: they decide between speed and memory."""

import msgspec

from brim.core.machine import MachineSpec
from brim.core.model import ModelSpec
from brim.core.plan import Objective
from brim.errors import ConfigError
from brim.planner.memory import check_kv_type, is_quantised


class LoadOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The options that decide between speed and memory, chosen together, with one reason each."""

    kv_type_k: str
    kv_type_v: str
    flash_attention: bool
    repack_weights: bool
    reasons: dict[str, str]


def load_options(
    spec: ModelSpec,
    machine: MachineSpec,
    engine: str,
    objective: Objective,
    kv_type: str | None,
    flash_attention: bool | None,
) -> LoadOptions:
    """KV type, flash attention and repacking for the objective, with explicit wishes on top."""
    if engine == "toy":
        reason = "the toy engine has no such option"
        return LoadOptions(
            kv_type_k="f16", kv_type_v="f16", flash_attention=False, repack_weights=False,
            reasons=dict.fromkeys(("kv_type", "flash_attention", "repack_weights"), reason),
        )  # fmt: skip
    options = _preferred_options(machine, objective)
    reasons = dict(options.reasons)
    chosen = options.kv_type_k
    if kv_type is not None:
        check_kv_type(spec, kv_type)
        chosen, reasons["kv_type"] = kv_type, "asked for"
    elif is_quantised(chosen) and (spec.key_dim % 32 or spec.value_dim % 32):
        chosen = "f16"
        reasons["kv_type"] = "blocks of 32 values do not divide the model's heads"
    flash = options.flash_attention
    if flash_attention is not None:
        flash, reasons["flash_attention"] = flash_attention, "asked for"
    if is_quantised(chosen) and not flash:
        if flash_attention is False and kv_type is not None:
            raise ConfigError(
                f"a quantised V cache ({chosen}) needs flash attention; "
                "turn it on, or use f16 for the KV cache",
                param="flash_attention",
            )
        if flash_attention is False:
            chosen, reasons["kv_type"] = "f16", "a quantised V needs flash attention, which is off"
        else:
            flash, reasons["flash_attention"] = True, "a quantised V cache needs it"
    return LoadOptions(
        kv_type_k=chosen, kv_type_v=chosen, flash_attention=flash,
        repack_weights=options.repack_weights, reasons=reasons,
    )  # fmt: skip


def _preferred_options(machine: MachineSpec, objective: Objective) -> LoadOptions:
    """What suits the objective where nobody wishes otherwise (figures: x86, 1.24 B Q4_K_M)."""
    if machine.gpu_limit_bytes is not None or objective is Objective.MEMORY:
        on_gpu = machine.gpu_limit_bytes is not None
        return LoadOptions(
            kv_type_k="q8_0", kv_type_v="q8_0", flash_attention=True, repack_weights=False,
            reasons={
                "kv_type": "half the bytes of f16" + (" at GPU speed" if on_gpu else ""),
                "flash_attention": "a quantised V cache needs it",
                "repack_weights": "the GPU reads the mapped file"
                if on_gpu
                else "weights stay mapped file pages, which the system may drop and read again",
            },
        )  # fmt: skip
    if objective is Objective.PREFILL:
        return LoadOptions(
            kv_type_k="f16", kv_type_v="f16", flash_attention=True, repack_weights=False,
            reasons={
                "kv_type": "a quantised V cache costs up to half of a CPU's decode speed",
                "flash_attention": "gains 18 % of a CPU's prefill for 8 % of its decode",
                "repack_weights": "rearranged weights cost a third of prefill speed here",
            },
        )  # fmt: skip
    return LoadOptions(
        kv_type_k="f16", kv_type_v="f16", flash_attention=False, repack_weights=True,
        reasons={
            "kv_type": "a quantised V cache costs up to half of a CPU's decode speed",
            "flash_attention": "costs 8 % of a CPU's decode at 2,048 tokens; off, its scores take "
            "scratch memory for every head and cell",
            "repack_weights": "decodes up to 13 % faster, for a second copy of some weights",
        },
    )  # fmt: skip


def exact_options(
    spec: ModelSpec, kv_type: str | None, flash_attention: bool | None
) -> LoadOptions:
    """The one combination whose results are the same to the bit whatever the batch holds."""
    if kv_type not in (None, "q8_0") or flash_attention is False:
        raise ConfigError(
            "the exact profile is q8_0 KV with flash attention; leave other wishes out",
            param="exact_profile",
        )
    check_kv_type(spec, "q8_0")
    reason = "the exact profile: other kernels change with the number of rows"
    return LoadOptions(
        kv_type_k="q8_0", kv_type_v="q8_0", flash_attention=True, repack_weights=False,
        reasons=dict.fromkeys(("kv_type", "flash_attention", "repack_weights"), reason),
    )  # fmt: skip
