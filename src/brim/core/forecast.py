"""How fast a model will run: a forecast with its range, and what it was made from."""

import msgspec

from brim.core.model import KvLayer


class SpeedRange(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens a second: nine in ten measurements should lie within low and high."""

    low: float
    expected: float
    high: float


class SpeedShape(msgspec.Struct, frozen=True, kw_only=True):
    """What of a model decides its speed; from a header, a config or a published measurement."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    """Of an attending layer."""
    key_dim: int
    vocab_size: int
    active_bytes: int
    """Weights that one decoded token reads."""
    weights_bytes: int
    active_parameters: int
    """Multiply-adds of one token outside attention."""
    kv_layers: tuple[KvLayer, ...] = ()
    num_experts: int = 0
    num_active_experts: int = 0
    num_recurrent_layers: int = 0
    recurrent_state_bytes: int = 0
    quant: str = ""
    """'Q4_K_M', 'F16', 'MLX 4bit', ...: what decides the cost of unpacking weights."""
    matrix_bytes: dict[str, int] = {}
    """Bytes of the matrices by tensor type, as in `ModelSpec`; empty where only the quant is
    known."""


class SpeedForecast(msgspec.Struct, frozen=True, kw_only=True):
    """What one loaded model will do on one machine."""

    decode_tok_s: SpeedRange
    """One sequence at the depth asked for, machine cool."""
    prefill_tok_s: SpeedRange
    """Reading a prompt of the length asked for."""
    decode_ceiling_tok_s: float | None
    """Bandwidth over bytes read for a token; no forecast is above it.  None where the bandwidth
    is not known."""
    source: str
    """What it was made from: 'calibration of 2026-11-21', 'measured Macs (M4 Max, llama.cpp)'."""
    reasons: dict[str, str] = {}


class Forecast(msgspec.Struct, frozen=True, kw_only=True):
    """All that is said about a plan's speed; None where nothing is known of the machine."""

    speed: SpeedForecast | None = None
    """At the depth that was asked for."""
    full_decode_tok_s: SpeedRange | None = None
    """Decode when one sequence fills the context."""
    sustained_decode_tok_s: SpeedRange | None = None
    """Decode once the machine is warm, after a minute or two."""
    load_s: float | None = None
    """From nothing to ready, the file not yet in the page cache."""
    first_token_s: float | None = None
    """Of a prompt of `prompt_tokens`, on a loaded model."""
    depth_tokens: int = 0
    prompt_tokens: int = 0
    reasons: dict[str, str] = {}
