"""Models and machines to plan for."""

import pytest

from brim.core.machine import MachineSpec
from brim.core.model import ModelSpec

LLAMA_1B = ModelSpec(
    name="llama-1b", paths=("llama-1b.gguf",), format="gguf", architecture="llama",
    fingerprint="f", num_parameters=1_235_814_400, weights_bytes=799_862_912, num_layers=16,
    hidden_size=2048, num_heads=32, num_kv_heads=(8,) * 16, key_dim=64, value_dim=64,
    vocab_size=128_256, trained_context_tokens=131_072, feed_forward_size=8192, quant="Q4_K_M",
    active_bytes=799_862_912, active_parameters=1_235_814_400,
    matrix_bytes={"Q4_K": 466_747_392, "Q6_K": 332_867_584},
)  # fmt: skip


@pytest.fixture
def llama_1b() -> ModelSpec:
    """Llama 3.2 1B as Q4_K_M."""
    return LLAMA_1B


@pytest.fixture
def laptop() -> MachineSpec:
    """A machine of 16 GiB without a GPU that shares them."""
    return MachineSpec(
        name="laptop", system="linux", ram_bytes=16 * 2**30, others_bytes=3 * 2**30,
        performance_cores=4,
    )  # fmt: skip


@pytest.fixture
def mac(laptop: MachineSpec) -> MachineSpec:
    """The same with a GPU limit, as Metal gives it."""
    return MachineSpec(
        name="mac", system="darwin", ram_bytes=laptop.ram_bytes, others_bytes=laptop.others_bytes,
        gpu_limit_bytes=12_713_115_648, performance_cores=4,
    )  # fmt: skip
