"""Random weight blocks, read back by gguf's own dequantiser."""

import gguf
import numpy as np
import pytest

from brim.bench.standin.blocks import RANDOM_TYPES, random_blocks
from brim.registry.ggml_types import GGML_TYPES

INTEGERS = {"I8", "I16", "I32", "I64"}

UNREADABLE = {"Q1_0", "Q2_0"}
"""gguf has no dequantiser for them; the integration tests have no backend for them either."""

FLOATS = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}

KINDS = {kind.name: kind for kind in GGML_TYPES.values()}


def values(type_name: str, deviation: float, num_values: int = 65_536) -> np.ndarray:
    rng = np.random.Generator(np.random.SFC64(7))
    blocks = random_blocks(type_name, num_values // KINDS[type_name].block_size, deviation, rng)
    if type_name in FLOATS:
        return blocks.view(FLOATS[type_name]).astype(np.float64)
    return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[type_name]).astype(np.float64)


@pytest.mark.parametrize("type_name", sorted(RANDOM_TYPES - INTEGERS - UNREADABLE))
def test_values_are_finite_and_as_wide_as_asked(type_name: str) -> None:
    """Every format's scales are set where the format has them, whatever the other bytes are."""
    # Formats whose scale is a power of two come within half an octave.
    is_coarse = type_name in {*FLOATS, "BF16", "MXFP4", "NVFP4"}
    for deviation in (1 / 16, 1 / 90):
        found = values(type_name, deviation)
        assert np.isfinite(found).all()
        assert found.std() == pytest.approx(deviation, rel=0.5 if is_coarse else 0.05)
        # A mean far from zero would add up over a row; ternary blocks have a fourth value, 2.
        assert abs(found.mean()) < (0.5 if type_name == "TQ2_0" else 0.15) * deviation


@pytest.mark.parametrize("type_name", sorted(INTEGERS))
def test_tables_of_indices_are_zero(type_name: str) -> None:
    """A random index could point past the end of whatever it points into."""
    rng = np.random.Generator(np.random.SFC64(7))
    assert not random_blocks(type_name, 100, 1.0, rng).any()


@pytest.mark.parametrize("type_name", ["Q4_K", "Q8_0", "F16", "MXFP4"])
def test_blocks_do_not_repeat(type_name: str) -> None:
    """Equal rows would tie exactly, and would compress in ways that real weights do not."""
    rng = np.random.Generator(np.random.SFC64(7))
    number = 4096 // KINDS[type_name].block_size
    blocks = [random_blocks(type_name, number, 0.02, rng).tobytes() for _ in range(64)]
    assert len(set(blocks)) == len(blocks)


def test_every_type_of_the_format_is_known_but_those_for_activations() -> None:
    """A file with any weight type can be cloned."""
    assert set(KINDS) - RANDOM_TYPES == {"Q8_1", "Q8_K"}
