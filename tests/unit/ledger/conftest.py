"""Machines and models whose bytes are easy to add up."""

import pytest

from brim.core.machine import MachineSpec
from brim.core.model import ModelSpec

GB = 10**9


@pytest.fixture
def machine() -> MachineSpec:
    """20 GB of RAM, 5 of them used by others: 14 GB comfortable and 14 tight."""
    return MachineSpec(name="m", system="linux", ram_bytes=20 * GB, others_bytes=5 * GB)


@pytest.fixture
def llama_8b() -> ModelSpec:
    """Llama 3.1 8B as Q4_K_M."""
    return ModelSpec(
        name="llama-8b", paths=(), format="gguf", architecture="llama", fingerprint="f",
        num_parameters=8_030_261_248, weights_bytes=4_912_898_048, num_layers=32,
        hidden_size=4096, num_heads=32, num_kv_heads=(8,) * 32, key_dim=128, value_dim=128,
        vocab_size=128_256, trained_context_tokens=131_072, feed_forward_size=14_336,
        quant="Q4_K_M",
    )  # fmt: skip
