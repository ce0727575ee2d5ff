"""Reads published measurements: what a row says of its machine, engine, depth and prompt.

Owns what a row's fields mean; the model's shape is row_shape's.  Fields that are results
themselves (an efficiency, a rate in TFLOPS) are never read.
"""

import re
from collections.abc import Iterable
from typing import Annotated, Any

import msgspec

from brim.core.machine import MachineSpec
from brim.errors import ConfigError
from brim.planner.apple.terms import Setting
from brim.planner.kv import KV_TYPES

GIB = 2**30

MAX_ROWS = 20_000
"""Twenty times the largest collection known; a forecast takes about 0.1 ms."""

OLD_LLAMA_CPP = "llama.cpp before 2025"
"""Without fused attention and with slower kernels: its rows must not set what today's users get."""

FLASH_BY_DEFAULT = "2025-09"
"""Since then llama.cpp fuses attention unless told not to (`-fa auto`, end of August 2025)."""

DEFAULT_GENERATED_TOKENS = 128
"""llama-bench's `-n`, where a row does not say how many tokens it timed."""


Amount = Annotated[float, msgspec.Meta(ge=0, le=1e12)]


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One published measurement; whatever the source does not say is None."""

    chip: str
    kind: str
    """'decode' or 'prefill'."""
    engine: str
    model: str
    quant: str | None = None
    tok_s: Amount | None = None
    """What was measured; None where a row only asks for a forecast."""
    id: str | None = None
    gpu_cores: Amount | None = None
    ram_gb: Amount | None = None
    bandwidth_gb_s: Amount | None = None
    engine_version: str | None = None
    arch: dict[str, Any] | None = None
    weights_gib: Amount | None = None
    weights_gib_calc: Amount | None = None
    active_gib_calc: Amount | None = None
    read_gib_calc: Amount | None = None
    kv_type: str | None = None
    flash_attn: bool | None = None
    test: str | None = None
    depth_tokens: Amount | None = None
    n_prompt: Amount | None = None
    n_gen: Amount | None = None
    avg_kv_tokens: Amount | None = None
    source: str | None = None
    date: str | None = None
    suspect: bool = False
    suspect_reason: str | None = None


def decode_rows(raw: bytes) -> list[Row]:
    """The rows of a JSON list, or of an object with a list named `rows`.

    Raises:
        ConfigError: It is not such a list, a row lacks what every row must say, or there are more
            than `MAX_ROWS` rows.
    """
    try:
        document = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"the rows are not JSON ({error}); give a JSON list of rows") from error
    if isinstance(document, dict):
        document = document.get("rows")
    if not isinstance(document, list) or not document:
        raise ConfigError(
            "there are no rows; give a JSON list with one object for each measurement"
        )
    if len(document) > MAX_ROWS:
        raise ConfigError(f"{len(document)} rows are too many; give at most {MAX_ROWS} at once")
    return [_convert(item, number) for number, item in enumerate(document, 1)]


def _convert(item: object, number: int) -> Row:
    try:
        row = msgspec.convert(item, Row)
    except msgspec.ValidationError as error:
        raise ConfigError(f"row {number} cannot be read: {error}; mend that field") from error
    if row.kind not in ("decode", "prefill"):
        raise ConfigError(f"row {number} is of kind '{row.kind}'; it must be decode or prefill")
    return row


def is_comparable(row: Row) -> bool:
    """Whether the row can judge a forecast: not suspect, architecture and GPU cores known."""
    return not row.suspect and bool(row.arch) and bool(row.gpu_cores) and bool(row.tok_s)


def machine_of(row: Row, named: MachineSpec | None) -> MachineSpec | None:
    """The machine of a row, or None where neither the row nor the chip table knows its bandwidth.

    Args:
        row: The measurement.
        named: The chip's bin in the table of chips: that of the row's GPU cores, the lower one
            where the row does not say.
    """
    bandwidth = int(row.bandwidth_gb_s * 1e9) if row.bandwidth_gb_s else None
    if named is not None:
        return msgspec.structs.replace(
            named, memory_bandwidth=bandwidth or named.memory_bandwidth
        )  # fmt: skip
    if bandwidth is None or not row.gpu_cores:
        return None
    return MachineSpec(
        name=row.chip,
        system="darwin",
        ram_bytes=int((row.ram_gb or 0) * GIB),
        others_bytes=0,
        chip=row.chip,
        gpu_cores=int(row.gpu_cores),
        memory_bandwidth=bandwidth,
        is_at_hand=False,
    )


def depth_tokens_of(row: Row) -> int:
    """Mean number of cached tokens while the row's tokens were decoded."""
    if row.avg_kv_tokens is not None:
        return max(int(row.avg_kv_tokens), 0)
    return max(int((row.depth_tokens or 0) + (row.n_gen or DEFAULT_GENERATED_TOKENS) / 2), 0)


def prompt_tokens_of(row: Row) -> int:
    """Length of the prompt of a prefill row.

    A row that averages several prompts gives their mean as its depth.
    """
    return max(int(row.n_prompt or row.depth_tokens or 512), 1)


def setting_of(row: Row) -> Setting:
    """How the row's model was run: its engine as the fit groups them, attention and KV type."""
    engine = engine_group(row)
    kv_type = "f16" if unknown_kv_type(row) else (row.kv_type or "f16").lower()
    return Setting(
        engine=engine,
        flash_attention=_is_fused(row, engine),
        kv_type_k=kv_type,
        kv_type_v=kv_type,
    )


def unknown_kv_type(row: Row) -> str | None:
    """The row's KV type where it is none of llama.cpp's; it is then taken for f16."""
    return row.kv_type if row.kv_type and row.kv_type.lower() not in KV_TYPES else None


def engine_group(row: Row) -> str:
    """The engine as the fit groups them: by whose kernels run, and of llama.cpp by the era."""
    engine, quant = row.engine.lower(), (row.quant or "").lower()
    has_mlx_weights = any(word in quant for word in ("mlx", "int4", "nvfp", "mxfp8"))
    if "llamafile" in engine:
        return "llamafile"
    if "mlx" in engine:
        return "mlx-lm" if engine.startswith("mlx") else "mlx server"
    if "llama.cpp" not in engine and has_mlx_weights:
        return "mlx server"
    if engine == "ollama":
        return "ollama"
    return OLD_LLAMA_CPP if (row.date or "9999") < "2025" else "llama.cpp"


def _is_fused(row: Row, engine: str) -> bool:
    """Whether attention was fused (flash attention)."""
    if engine.startswith("mlx"):
        # mlx-lm computes the soft-capped scores of Gemma 2 outside its fused kernel.
        return not row.model.startswith("Gemma 2")
    if row.flash_attn is not None:
        return row.flash_attn
    return engine in ("llama.cpp", "ollama") and (row.date or "9999") >= FLASH_BY_DEFAULT


def by_source(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows under the repository or page that they come from."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        name = re.split(r"[@#]", row.source or "unknown")[0]
        found.setdefault(name, []).append(row)
    return found
