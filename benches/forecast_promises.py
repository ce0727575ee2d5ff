"""What guides promise of decode speed, compared with the forecast and with bandwidth over bytes."""

from typing import Any, Literal

import msgspec

from brim.cli.forecast import chip_of
from brim.core.forecast import SpeedRange
from brim.planner.apple.row_forecast import forecast_row
from brim.planner.apple.rows import Row

SHORT_CONTEXT_TOKENS = 256
"""The guides speak of short contexts: a question and half of its answer."""

Verdict = Literal[
    "impossible", "impossible at its upper end", "too high", "plausible", "too low",
    "no such machine",
]  # fmt: skip


def _llama(layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, vocab: int) -> Any:
    return {
        "layers": layers, "hidden": hidden, "heads": heads, "kv_heads": kv_heads, "head_dim": 128,
        "ffn": ffn, "vocab": vocab, "tied_embeddings": False,
    }  # fmt: skip


def _qwen35(layers: int, hidden: int, heads: int, ffn: int) -> Any:
    return {
        "layers": layers, "hidden": hidden, "heads": heads, "kv_heads": 4, "head_dim": 256,
        "ffn": ffn, "vocab": 248320, "tied_embeddings": False, "kv_layers_full": layers // 4,
        "linear_attention": "gated delta layers in 3 of 4",
    }  # fmt: skip


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama 3.1 70B": _llama(80, 8192, 64, 8, 28672, 128256),
    "Llama 3 70B": _llama(80, 8192, 64, 8, 28672, 128256),
    "Llama 3.1 8B": _llama(32, 4096, 32, 8, 14336, 128256),
    "Llama 3.2 3B": _llama(28, 3072, 24, 8, 8192, 128256) | {"tied_embeddings": True},
    "Qwen 2.5 7B": _llama(28, 3584, 28, 4, 18944, 152064),
    "Qwen2.5 72B": _llama(80, 8192, 64, 8, 29568, 152064),
    "Mistral 7B": _llama(32, 4096, 32, 8, 14336, 32768),
    "Codestral 22B": _llama(56, 6144, 48, 8, 16384, 32768),
    "Devstral Small 24B": _llama(40, 5120, 32, 8, 32768, 131072),
    "Mistral Large 123B": _llama(88, 12288, 96, 8, 28672, 32768),
    "Qwen 3.5 9B": _qwen35(32, 4096, 16, 12288),
    "Qwen 3.5 27B": _qwen35(64, 5120, 24, 17408),
    "DeepSeek V3 671B": _llama(61, 7168, 128, 128, 18432, 129280)
    | {
        "mla": {"kv_lora_rank": 512, "rope_dim": 64},
        "moe": {"experts": 256, "active": 8, "shared": 1, "moe_ffn": 2048},
    },
}
"""Dimensions of the models that the guides name.  Source: their config.json."""


class Promise(msgspec.Struct, frozen=True):
    """What a guide tells users to expect."""

    source: str
    chip: str
    ram_gb: int
    model: str
    quant: str
    engine: str
    tok_s_low: float
    tok_s_high: float
    weights_gb: float | None = None
    note: str | None = None


class Compared(msgspec.Struct, frozen=True, kw_only=True):
    """A promise with the forecast for the same machine and model."""

    promise: Promise
    verdict: Verdict
    forecast: SpeedRange | None = None
    ceiling_tok_s: float | None = None


def read_promises(raw: bytes) -> list[Promise]:
    """The promises of a file with a list named `rows`."""
    document = msgspec.json.decode(raw)
    return msgspec.convert(document["rows"], list[Promise])


def compare(promise: Promise) -> Compared:
    """The verdict on one promise; a model that the table lacks is an error of this script."""
    row = Row(
        chip=promise.chip, kind="decode", engine=promise.engine, model=promise.model,
        quant=promise.quant, ram_gb=float(promise.ram_gb), arch=ARCHITECTURES[promise.model],
        weights_gib=promise.weights_gb * 1e9 / 2**30 if promise.weights_gb else None,
        avg_kv_tokens=SHORT_CONTEXT_TOKENS, flash_attn=True, date="2026",
    )  # fmt: skip
    found = forecast_row(row, chip_of)
    if found.forecast_tok_s is None or found.ceiling_tok_s is None:
        return Compared(promise=promise, verdict="no such machine")
    return Compared(
        promise=promise,
        verdict=_verdict(promise, found.forecast_tok_s, found.ceiling_tok_s),
        forecast=found.forecast_tok_s,
        ceiling_tok_s=found.ceiling_tok_s,
    )


def _verdict(promise: Promise, speed: SpeedRange, ceiling_tok_s: float) -> Verdict:
    if promise.tok_s_low > ceiling_tok_s:
        return "impossible"
    if promise.tok_s_high > ceiling_tok_s:
        return "impossible at its upper end"
    if promise.tok_s_low > speed.high:
        return "too high"
    return "too low" if promise.tok_s_high < speed.low else "plausible"
