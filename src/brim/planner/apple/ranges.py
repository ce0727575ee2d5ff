"""How far a forecast for Apple silicon may be off: which constants widen or narrow its range."""

import re

from brim.core.forecast import SpeedShape
from brim.planner.apple.quant_family import quant_family
from brim.planner.apple.terms import AppleChip, Setting

FEW_ROWS = 3
"""Measurements of a chip with an engine below which their own constants are hardly pinned down."""

DEEP_TOKENS = 8192
"""Beyond it attention's kernels matter more than the weights, and fewer people measured."""

SMALL_BYTES = 2**30
"""Below it overheads outweigh the bytes."""


def familiarity(chip: AppleChip, engine: str, num_rows: dict[str, int]) -> str:
    """How well a chip with an engine is covered by measurements.

    Args:
        chip: The chip.
        engine: The engine's group.
        num_rows: Measurements by chip, GPU cores and engine ('M4 Pro 20/llama.cpp').

    Example:
        >>> m4 = AppleChip(name="M4", generation="M4", tier="base", gpu_cores=10,
        ...                memory_bandwidth=120e9, fp32_flops=4.6e12)
        >>> familiarity(m4, "llama.cpp", {"M4 10/ollama": 2})
        'other engine'
    """
    seen = num_rows.get(cell(chip, engine), 0)
    if seen:
        return "well known" if seen >= FEW_ROWS else "known"
    return "other engine" if engines_of(chip, num_rows) else "unknown chip"


def engines_of(chip: AppleChip, num_rows: dict[str, int]) -> set[str]:
    """The engines that any bin of the chip was measured with.

    Example:
        >>> m4 = AppleChip(name="M4", generation="M4", tier="base", gpu_cores=8,
        ...                memory_bandwidth=120e9, fp32_flops=3.7e12)
        >>> engines_of(m4, {"M4 10/ollama": 2, "M4 Pro 20/mlx-lm": 9})
        {'ollama'}
    """
    cells = re.compile(rf"{re.escape(chip.name)} \d+/(.+)")
    return {found[1] for name, n in num_rows.items() if n and (found := cells.fullmatch(name))}


def cell(chip: AppleChip, engine: str) -> str:
    """The name under which a chip's bin with an engine is counted."""
    return f"{chip.name} {chip.gpu_cores}/{engine}"


def width_effects(
    shape: SpeedShape, chip: AppleChip, setting: Setting, num_tokens: float, known: str
) -> tuple[str, ...]:
    """Constants whose sum is the log of a range's half width in log speed.

    Args:
        shape: The model.
        chip: The chip.
        setting: How it is run.
        num_tokens: Depth of a decode, length of a prompt.
        known: Its `familiarity`.
    """
    effects = [
        "width",
        f"width/{known}",
        f"width/{setting.engine}",
        f"width/{chip.generation}",
        f"width/{quant_family(shape.quant)}",
    ]
    if known == "well known":
        effects.append(f"width/{cell(chip, setting.engine)}")
    if shape.num_experts:
        effects.append("width/experts")
    if shape.num_recurrent_layers:
        effects.append("width/recurrent")
    if num_tokens > DEEP_TOKENS:
        effects.append("width/deep")
    if shape.active_bytes < SMALL_BYTES:
        effects.append("width/small")
    return tuple(effects)
