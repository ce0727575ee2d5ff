"""What one token or one prompt makes an engine do, in units whose cost can be measured.

A calibration fits seconds for each unit to measured samples, and a forecast multiplies them out
again; both take the amounts from here, so that they cannot disagree about a unit.

    token            fixed work of a step, whatever the model
    layer            fixed work of a layer and step
    vocabulary       tokens to choose from, once for each drawn token
    bytes TYPE       bytes of matrices of one tensor type, in a prompt once for each of its rows;
                     'bytes TYPE repacked' where the engine was asked to rearrange them
    pass TYPE        in a prompt only: bytes of those matrices, once for each micro-batch
    drawing bytes    in a prompt only: bytes that only the row with the drawn token goes through
    row widths       in a prompt only: rows x layers x hidden width (norms, residuals, copies)
    scores K/V       attention: cells x query heads x (key + value) width; 'flash' where it is fused
    cells            attention: cells x query heads, whatever the types; 'cells flash' likewise
    scattered        values of V that a row stores where attention is not fused: each in a row of
                     its own, because V is kept transposed there
    kv bytes         bytes of KV cache that a decoded token reads
    state bytes      recurrent state that a token reads and writes

Attention is counted by query heads, not KV heads: an engine on a CPU goes through the cells once
for each of them.
"""

from collections.abc import Mapping
from typing import NamedTuple

from brim.core.forecast import SpeedShape
from brim.planner.kv import layer_bytes_read

TOKEN, LAYER, VOCABULARY = "token", "layer", "vocabulary"
ROW_WIDTHS, DRAWING_BYTES = "row widths", "drawing bytes"
SCATTERED, KV_BYTES, STATE_BYTES = "scattered", "kv bytes", "state bytes"

BITS_PER_WEIGHT = {
    "F32": 32.0, "F16": 16.0, "BF16": 16.0,
    "Q8_0": 8.5, "Q6_K": 6.5625, "Q5_K": 5.5, "Q5_1": 6.0, "Q5_0": 5.5,
    "Q4_K": 4.5, "Q4_1": 5.0, "Q4_0": 4.5, "IQ4_NL": 4.5, "IQ4_XS": 4.25, "MXFP4": 4.25,
    "Q3_K": 3.4375, "IQ3_S": 3.4375, "IQ3_XXS": 3.0625, "Q2_K": 2.625, "IQ2_S": 2.5625,
    "IQ2_XS": 2.3125, "IQ2_XXS": 2.0625, "IQ1_S": 1.5625, "IQ1_M": 1.75,
}  # fmt: skip
"""Of ggml's tensor types: facts of the format (block bytes x 8 / block values)."""

RECIPE_TYPES = {"Q4_K_M": "Q4_K", "Q4_K_S": "Q4_K", "Q5_K_M": "Q5_K", "Q5_K_S": "Q5_K",
                "Q3_K_M": "Q3_K", "Q3_K_S": "Q3_K", "Q3_K_L": "Q3_K"}  # fmt: skip
"""The type of most tensors, where a recipe's name is not that of a type."""


class KvTypes(NamedTuple):
    """How attention is computed."""

    key: str
    value: str
    flash_attention: bool

    @property
    def term(self) -> str:
        """Its unit.

        Example:
            >>> KvTypes("q8_0", "f16", True).term
            'scores q8_0/f16 flash'
        """
        return f"scores {self.key}/{self.value}" + (" flash" if self.flash_attention else "")

    @property
    def cells_term(self) -> str:
        """The unit of what attention does for a cell, whatever the width of a head."""
        return "cells flash" if self.flash_attention else "cells"


def weights_term(type_name: str, *, repack_weights: bool) -> str:
    """The unit of a tensor type's bytes.

    Types that an engine never rearranges have no cost of the second kind; the first then counts.

    Example:
        >>> weights_term("Q4_K", repack_weights=True)
        'bytes Q4_K repacked'
    """
    return f"bytes {type_name}" + (" repacked" if repack_weights else "")


def decode_terms(
    shape: SpeedShape, *, kv: KvTypes, repack_weights: bool, depth_tokens: int
) -> dict[str, float]:
    """Units of one decoded token of one sequence that holds `depth_tokens`."""
    terms = {TOKEN: 1.0, LAYER: float(shape.num_layers), VOCABULARY: float(shape.vocab_size)}
    for type_name, num_bytes in active_bytes_by_type(shape).items():
        terms[weights_term(type_name, repack_weights=repack_weights)] = float(num_bytes)
    terms |= _attention(shape, kv, depth_tokens, 1)
    terms[KV_BYTES] = kv_bytes_read(shape, kv, depth_tokens)
    if shape.recurrent_state_bytes:
        terms[STATE_BYTES] = 2.0 * shape.recurrent_state_bytes
    return terms


def prefill_terms(
    shape: SpeedShape,
    *,
    kv: KvTypes,
    repack_weights: bool,
    depth_tokens: int,
    prompt_tokens: int,
    micro_batch_tokens: int,
    draws_every_row: bool = False,
) -> dict[str, float]:
    """Units of reading `prompt_tokens` behind `depth_tokens`, to the first drawn token.

    The last feed-forward and the matrix that makes logits are computed only for rows from which a
    token is drawn: the last one, or with `draws_every_row` all, as when several sequences decode.
    """
    passes = -(-prompt_tokens // micro_batch_tokens)
    terms = {TOKEN: float(passes), LAYER: float(passes * shape.num_layers)}
    terms[VOCABULARY] = float(shape.vocab_size * (prompt_tokens if draws_every_row else 1))
    terms[ROW_WIDTHS] = float(prompt_tokens * shape.num_layers * shape.hidden_size)
    active = active_bytes_by_type(shape)
    every_row = active if draws_every_row else rowwise_bytes_by_type(shape)
    terms[DRAWING_BYTES] = sum(active.values()) - sum(every_row.values())
    # Several rows together use most experts, so a micro-batch reads them all.
    all_of_active = max(1.0, sum(shape.matrix_bytes.values()) / sum(active.values()))
    for type_name, num_bytes in every_row.items():
        term = weights_term(type_name, repack_weights=repack_weights)
        terms[term] = prompt_tokens * num_bytes
        terms[term.replace("bytes", "pass", 1)] = passes * num_bytes * all_of_active
    terms |= _attention(shape, kv, depth_tokens, prompt_tokens)
    if shape.recurrent_state_bytes:
        terms[STATE_BYTES] = 2.0 * shape.recurrent_state_bytes * prompt_tokens
    return terms


def active_bytes_by_type(shape: SpeedShape) -> dict[str, float]:
    """Bytes that one decoded token reads, by tensor type.

    Of a model with experts each type gets the same share: which types the unused experts have is
    not in the shape.
    """
    total = sum(shape.matrix_bytes.values())
    if not total:
        return {RECIPE_TYPES.get(shape.quant, shape.quant): float(shape.active_bytes)}
    share = min(1.0, shape.active_bytes / total)
    return {name: share * num_bytes for name, num_bytes in shape.matrix_bytes.items() if num_bytes}


def rowwise_bytes_by_type(shape: SpeedShape) -> dict[str, float]:
    """Bytes of the matrices that every row of a prompt goes through.

    All but the output's and the last layer's feed-forward, which llama.cpp computes for drawing
    rows alone.  Source: `inp_out_ids` in its src/models.
    """
    found = active_bytes_by_type(shape)
    name = output_type(found)
    bits = BITS_PER_WEIGHT.get(name, 8.0)
    output_bytes = min(found[name], shape.vocab_size * shape.hidden_size * bits / 8)
    layers = found | {name: found[name] - output_bytes}
    kept = 1 - _feed_forward_share(shape) / shape.num_layers
    return {name: kept * num_bytes for name, num_bytes in layers.items()}


def _feed_forward_share(shape: SpeedShape) -> float:
    """How much of a layer's active weights is not attention."""
    in_layers = shape.active_parameters - shape.vocab_size * shape.hidden_size
    if in_layers <= 0 or not shape.num_layers:
        return 0.0
    attending = [layer for layer in shape.kv_layers if layer.key_width]
    queries = shape.num_heads * shape.key_dim
    attention = sum(
        shape.hidden_size * (2 * queries + layer.key_width + layer.value_width)
        for layer in attending
    )
    return min(1.0, max(0.0, 1 - attention / in_layers))


def output_type(bytes_by_type: Mapping[str, float]) -> str:
    """The type of the output matrix: of those present, the one with the most bits.

    llama.cpp's recipes never give it fewer bits than the layers have, and float types beside a
    quantised one are routers and the like, not matrices of this size.

    Example:
        >>> output_type({"Q4_K": 600.0, "Q6_K": 300.0, "F32": 0.1})
        'Q6_K'
    """
    largest = max(bytes_by_type.values())
    present = [name for name, num_bytes in bytes_by_type.items() if num_bytes > largest / 50]
    return max(present, key=lambda name: BITS_PER_WEIGHT.get(name, 0.0))


def kv_bytes_read(shape: SpeedShape, kv: KvTypes, depth_tokens: int) -> float:
    """Bytes of KV cache that one decoded token goes through at a depth."""
    return sum(layer_bytes_read(layer, kv.key, kv.value, depth_tokens) for layer in shape.kv_layers)


def _attention(
    shape: SpeedShape, kv: KvTypes, depth_tokens: int, num_rows: int
) -> dict[str, float]:
    """What attention does over all layers for some rows behind a depth."""
    work = looked_at = 0.0
    for layer in shape.kv_layers:
        if not layer.key_width or not shape.num_kv_heads:
            continue
        cells = _cells(depth_tokens, num_rows, layer.window_tokens) * shape.num_heads
        # With MLA the one head's V is a view of its K, but is multiplied all the same.
        width = layer.key_width + (layer.value_width or layer.key_width)
        work += cells * width / shape.num_kv_heads
        looked_at += cells
    terms = {kv.term: work, kv.cells_term: looked_at}
    if not kv.flash_attention:
        terms[SCATTERED] = float(num_rows * sum(layer.value_width for layer in shape.kv_layers))
    return terms


def _cells(depth_tokens: int, num_rows: int, window_tokens: int | None) -> float:
    """Cells that all rows together look at: row i sees the depth, the rows before it and itself."""
    last = depth_tokens + num_rows
    if window_tokens is None or last <= window_tokens:
        return num_rows * (depth_tokens + (num_rows + 1) / 2)
    growing = max(0, window_tokens - depth_tokens)
    return growing * (depth_tokens + (growing + 1) / 2) + (num_rows - growing) * window_tokens
