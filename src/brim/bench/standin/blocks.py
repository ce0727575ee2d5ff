"""Random weights in every block format of ggml, valid to the bit and with a chosen spread.

A quantised block is random bytes in which only the scales are set: quants may have any value.  So
a gigabyte takes about a second, and speed is what it is for trained weights, since no kernel looks
at values.  The scales are chosen so that the values' standard deviation is what was asked for and
their mean is near zero; activations then stay finite through any number of layers.
"""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from brim.registry.ggml_types import GGML_TYPES

Bytes = npt.NDArray[np.uint8]

_KINDS = {kind.name: kind for kind in GGML_TYPES.values()}


class _Scaled(NamedTuple):
    """Where a block's f16 scales lie, and what its values are when the first one is 1."""

    scales: tuple[tuple[int, float], ...]
    """(byte offset, factor of the scale); a second one is the minimum, chosen for a mean of 0."""
    deviation: float
    """Standard deviation of the values at scale 1, the other bytes being uniform."""


# Deviations: drawn blocks through gguf's own dequantiser, which a test repeats.
_SCALED: dict[str, _Scaled] = {
    "Q1_0": _Scaled(((0, 1.0),), 1.0),
    "Q2_0": _Scaled(((0, 1.0),), 1.22),
    "Q4_0": _Scaled(((0, 1.0),), 4.61),
    "Q4_1": _Scaled(((0, 1.0), (2, -7.5)), 4.61),
    "Q5_0": _Scaled(((0, 1.0),), 9.23),
    "Q5_1": _Scaled(((0, 1.0), (2, -15.5)), 9.23),
    "Q8_0": _Scaled(((0, 1.0),), 73.9),
    "Q2_K": _Scaled(((80, 1.0), (82, 1.5)), 13.9),
    "Q3_K": _Scaled(((108, 1.0),), 43.2),
    "Q4_K": _Scaled(((0, 1.0), (2, 7.5)), 258.0),
    "Q5_K": _Scaled(((0, 1.0), (2, 15.5)), 526.0),
    "Q6_K": _Scaled(((208, 1.0),), 1366.0),
    "IQ1_S": _Scaled(((0, 1.0),), 7.19),
    "IQ2_XXS": _Scaled(((0, 1.0),), 53.3),
    "IQ2_XS": _Scaled(((0, 1.0),), 55.9),
    "IQ2_S": _Scaled(((0, 1.0),), 56.3),
    "IQ3_XXS": _Scaled(((0, 1.0),), 142.0),
    "IQ3_S": _Scaled(((0, 1.0),), 140.0),
    "IQ4_NL": _Scaled(((0, 1.0),), 67.2),
    "IQ4_XS": _Scaled(((0, 1.0),), 1244.0),
    "TQ1_0": _Scaled(((52, 1.0),), 0.82),
    "TQ2_0": _Scaled(((64, 1.0),), 1.12),
}

_MXFP4_DEVIATION = 5.85
"""Of the doubled values 0 to 12 at exponent byte 128, which stands for one half of them each."""

_NVFP4_DEVIATION = 2.93
"""Of its values at a scale of 1."""

_IQ1_M_DEVIATION = 7.2

_OCTAVE_DEVIATION = math.sqrt(7 / 3)
"""Of +-[1, 2), uniform."""

RANDOM_TYPES = frozenset(
    {*_SCALED, "MXFP4", "NVFP4", "IQ1_M", "F16", "BF16", "F32", "F64", "I8", "I16", "I32", "I64"}
)
"""Types that `random_blocks` knows: all that occur in files as weights."""


def random_blocks(
    type_name: str, num_blocks: int, deviation: float, rng: np.random.Generator
) -> Bytes:
    """Blocks of random values around zero, as an array of shape (num_blocks, block_bytes).

    Args:
        type_name: One of RANDOM_TYPES.
        num_blocks: Blocks wanted; a float type's block is one element.
        deviation: Standard deviation of the values; float types keep it within a factor of 1.5.
        rng: Source of the random bits.
    """
    block_bytes = _KINDS[type_name].block_bytes
    # Integers are tables of indices: zero is the only one that is valid in every table.
    if type_name.startswith("I") and type_name[1:].isdigit():
        return np.zeros((num_blocks, block_bytes), dtype=np.uint8)
    words = rng.bit_generator.random_raw(-(-num_blocks * block_bytes // 8))
    blocks = words.view(np.uint8)[: num_blocks * block_bytes].reshape(num_blocks, block_bytes)
    if type_name in _SCALED:
        layout = _SCALED[type_name]
        for offset, factor in layout.scales:
            _put_f16(blocks, offset, factor * deviation / layout.deviation)
    else:
        _SPECIAL[type_name](blocks, deviation)
    return blocks


def _put_f16(blocks: Bytes, offset: int, value: float) -> None:
    blocks[:, offset : offset + 2] = np.array([value], dtype="<f2").view(np.uint8)


def _set_exponents(blocks: Bytes, deviation: float, mantissa_bits: int, exponent_bits: int) -> None:
    """Keep sign and mantissa of floats random and put all of them into one octave."""
    width = blocks.shape[1] * 8
    numbers = blocks.view(f"<u{blocks.shape[1]}")
    bias = 2 ** (exponent_bits - 1) - 1
    exponent = round(math.log2(deviation / _OCTAVE_DEVIATION)) + bias
    exponent = min(max(exponent, 1), 2 * bias)
    kept = (1 << (width - 1)) | ((1 << mantissa_bits) - 1)
    numbers &= numbers.dtype.type(kept)
    numbers |= numbers.dtype.type(exponent << mantissa_bits)


def _fill_f16(blocks: Bytes, deviation: float) -> None:
    _set_exponents(blocks, deviation, 10, 5)


def _fill_bf16(blocks: Bytes, deviation: float) -> None:
    _set_exponents(blocks, deviation, 7, 8)


def _fill_f32(blocks: Bytes, deviation: float) -> None:
    _set_exponents(blocks, deviation, 23, 8)


def _fill_f64(blocks: Bytes, deviation: float) -> None:
    _set_exponents(blocks, deviation, 52, 11)


def _fill_mxfp4(blocks: Bytes, deviation: float) -> None:
    blocks[:, 0] = 128 + round(math.log2(deviation / _MXFP4_DEVIATION))


def _fill_nvfp4(blocks: Bytes, deviation: float) -> None:
    # A scale is an unsigned float of 4 exponent bits (bias 7) and 3 of mantissa; below the first
    # exponent the mantissa counts steps of 2^-9.
    scale = deviation / _NVFP4_DEVIATION
    exponent = round(math.log2(scale)) + 7
    blocks[:, :4] = min(exponent, 15) << 3 if exponent >= 1 else max(1, round(scale * 512))


def _fill_iq1_m(blocks: Bytes, deviation: float) -> None:
    # The f16 scale is spread over the high nibbles of the four 16-bit words of sub-scales.
    value = np.array([deviation / _IQ1_M_DEVIATION], dtype="<f2").view("<u2")[0]
    for word in range(4):
        nibble = (int(value) >> (4 * word)) & 0xF
        high = blocks[:, 48 + 2 * word + 1]
        high &= 0x0F
        high |= np.uint8(nibble << 4)


_SPECIAL = {
    "MXFP4": _fill_mxfp4,
    "NVFP4": _fill_nvfp4,
    "IQ1_M": _fill_iq1_m,
    "F16": _fill_f16,
    "BF16": _fill_bf16,
    "F32": _fill_f32,
    "F64": _fill_f64,
}
