"""The memory forecast beside what llama.cpp says it would allocate, and what it did allocate.

Header-only stand-ins have the shapes of published models, from 0.5 B to 671 B; llama.cpp lays out
its caches and graphs for them without loading a weight.
"""

from pathlib import Path

import msgspec
import pytest
from conftest import require_engine
from support.models import plan_for

from brim.bench.standin import ARCHITECTURES, Dimensions, blueprint, tiny, write
from brim.core.model import ModelSpec
from brim.core.plan import Plan
from brim.engine import factory
from brim.engine.llamacpp.dry_run import LOG_RESOLUTION_BYTES, disagreements, dry_run, dry_runs
from brim.errors import ModelFileError
from brim.planner.memory import memory_terms
from brim.registry.describe import describe_gguf

MIB = 1024**2

SHAPES = {
    "qwen2 0.5B": Dimensions(
        architecture="qwen2", num_layers=24, hidden_size=896, vocab_size=151_936, num_heads=14,
        num_kv_heads=2, head_dim=64, feed_forward_size=4864, is_tied=True, has_qkv_bias=True,
    ),
    "qwen3 4B": Dimensions(
        architecture="qwen3", num_layers=36, hidden_size=2560, vocab_size=151_936, num_heads=32,
        num_kv_heads=8, head_dim=128, feed_forward_size=9728, is_tied=True,
    ),
    "llama 8B": Dimensions(
        architecture="llama", num_layers=32, hidden_size=4096, vocab_size=128_256, num_heads=32,
        num_kv_heads=8, head_dim=128, feed_forward_size=14_336,
    ),
    "llama 70B": Dimensions(
        architecture="llama", num_layers=80, hidden_size=8192, vocab_size=128_256, num_heads=64,
        num_kv_heads=8, head_dim=128, feed_forward_size=28_672,
    ),
    "qwen3moe 30B": Dimensions(
        architecture="qwen3moe", num_layers=48, hidden_size=2048, vocab_size=151_936, num_heads=32,
        num_kv_heads=4, head_dim=128, feed_forward_size=6144, num_experts=128,
        num_active_experts=8, expert_feed_forward_size=768,
    ),
    "gemma2 9B": Dimensions(
        architecture="gemma2", num_layers=42, hidden_size=3584, vocab_size=256_000, num_heads=16,
        num_kv_heads=8, head_dim=256, feed_forward_size=14_336, is_tied=True, window_tokens=4096,
    ),
    "gemma3 12B": Dimensions(
        architecture="gemma3", num_layers=48, hidden_size=3840, vocab_size=262_144, num_heads=16,
        num_kv_heads=8, head_dim=256, feed_forward_size=15_360, is_tied=True, window_tokens=1024,
    ),
    "phi3 mini": Dimensions(
        architecture="phi3", num_layers=32, hidden_size=3072, vocab_size=32_064, num_heads=32,
        num_kv_heads=32, head_dim=96, feed_forward_size=8192, has_rope_factors=True,
    ),
    "deepseek2 16B": Dimensions(
        architecture="deepseek2", num_layers=27, hidden_size=2048, vocab_size=102_400,
        num_heads=16, num_kv_heads=16, head_dim=192, rope_head_dim=64, value_head_dim=128,
        kv_lora_rank=512, feed_forward_size=10_944, num_experts=64, num_active_experts=6,
        expert_feed_forward_size=1408, num_shared_experts=2, num_leading_dense_layers=1,
    ),
    "deepseek2 671B": Dimensions(
        architecture="deepseek2", num_layers=61, hidden_size=7168, vocab_size=129_280,
        num_heads=128, num_kv_heads=128, head_dim=192, rope_head_dim=64, value_head_dim=128,
        kv_lora_rank=512, q_lora_rank=1536, feed_forward_size=18_432, num_experts=256,
        num_active_experts=8, expert_feed_forward_size=2048, num_shared_experts=1,
        num_leading_dense_layers=3,
    ),
    "gpt-oss 20B": Dimensions(
        architecture="gpt-oss", num_layers=24, hidden_size=2880, vocab_size=201_088, num_heads=64,
        num_kv_heads=8, head_dim=64, feed_forward_size=2880, num_experts=32, num_active_experts=4,
        expert_feed_forward_size=2880, window_tokens=128, has_qkv_bias=True,
    ),
    "mamba 2.8B": Dimensions(
        architecture="mamba", num_layers=64, hidden_size=2560, vocab_size=50_280, state_size=16,
        inner_size=5120, conv_kernel=4, time_step_rank=160,
    ),
    "jamba": Dimensions(
        architecture="jamba", num_layers=8, hidden_size=4096, vocab_size=65_536, num_heads=32,
        num_kv_heads=8, head_dim=128, feed_forward_size=14_336, state_size=16, inner_size=8192,
        conv_kernel=4, time_step_rank=256, recurrent_layers=(0, 1, 2, 3, 5, 6, 7),
    ),
    "falcon-h1 3B": Dimensions(
        architecture="falcon-h1", num_layers=32, hidden_size=2560, vocab_size=65_536, num_heads=10,
        num_kv_heads=2, head_dim=128, feed_forward_size=8704, state_size=256, inner_size=4096,
        conv_kernel=4, time_step_rank=32, group_count=1,
    ),
    "lfm2 1.2B": Dimensions(
        architecture="lfm2", num_layers=16, hidden_size=2048, vocab_size=65_536, num_heads=32,
        num_kv_heads=8, head_dim=64, feed_forward_size=8192, conv_kernel=3, is_tied=True,
        recurrent_layers=(0, 1, 3, 4, 6, 7, 9, 11, 13, 15),
    ),
    "qwen3next 80B": Dimensions(
        architecture="qwen3next", num_layers=48, hidden_size=2048, vocab_size=151_936,
        num_heads=16, num_kv_heads=2, head_dim=256, feed_forward_size=5120, num_experts=512,
        num_active_experts=10, expert_feed_forward_size=512, num_shared_experts=1, state_size=128,
        inner_size=4096, conv_kernel=4, time_step_rank=32, group_count=16,
        recurrent_layers=tuple(layer for layer in range(48) if (layer + 1) % 4),
    ),
}  # fmt: skip

BATCHES = [
    # cells, rows, sequences, flash attention, type of K, type of V
    (2048, 512, 1, True, "f16", "f16"),
    (8192, 512, 8, True, "q8_0", "q8_0"),
    (1024, 256, 3, True, "q4_0", "q4_0"),
    (32_768, 512, 4, True, "q8_0", "q4_0"),
    (2048, 512, 1, False, "f16", "f16"),
    (8192, 512, 16, False, "q8_0", "f16"),
]


def plans_of(spec: ModelSpec, *, full_windows: bool = True) -> list[Plan]:
    """A plan for each batch that the model can be asked for."""
    is_latent = any(layer.key_width and not layer.value_width for layer in spec.kv_layers)
    return [
        with_memory(plan_for("llamacpp"), spec, batch, full_windows)
        for batch in BATCHES
        if spec.key_dim % 32 == 0 and (batch[4] == batch[5] or not is_latent)
    ]


def with_memory(
    plan: Plan, spec: ModelSpec, batch: tuple[int, int, int, bool, str, str], full_windows: bool
) -> Plan:
    cells, rows, sequences, flash, kv_type_k, kv_type_v = batch
    memory = memory_terms(
        spec, engine="llamacpp", kv_tokens=cells, max_sequences=sequences, kv_type_k=kv_type_k,
        kv_type_v=kv_type_v, micro_batch_tokens=rows, flash_attention=flash, repack_weights=False,
        full_windows=full_windows,
    )  # fmt: skip
    return msgspec.structs.replace(
        plan, model=spec, kv_tokens=cells, max_sequences=sequences, kv_type_k=kv_type_k,
        kv_type_v=kv_type_v, max_batch_tokens=rows, micro_batch_tokens=rows,
        flash_attention=flash, memory=memory,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def engine() -> None:
    require_engine("llamacpp")


@pytest.mark.parametrize("name", SHAPES)
def test_published_shapes_take_what_llama_cpp_says(name: str, tmp_path: Path) -> None:
    """Weights agree to the byte, KV to the log's resolution, scratch memory within 5 % or 4 MiB."""
    shape = SHAPES[name]
    quant = "MXFP4_MOE" if shape.architecture == "gpt-oss" else "Q8_0"
    spec = describe_gguf(write(tmp_path / "m.gguf", blueprint(shape, quant), with_data=False))
    for full_windows in (True, False) if shape.window_tokens else (True,):
        plans = plans_of(spec, full_windows=full_windows)
        for plan, found in zip(plans, dry_runs(plans, full_windows=full_windows), strict=True):
            assert disagreements(plan, found) == []
            rounding = LOG_RESOLUTION_BYTES * len(found.caches)
            assert abs(plan.memory.kv_bytes - found.kv_bytes) <= rounding
            scratch = found.compute_bytes + found.output_bytes
            # Far below the tolerance: all but delta nets come out to the log's resolution.
            assert abs(plan.memory.compute_bytes - scratch) <= 2.1 * MIB


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_load_takes_what_was_planned(architecture: str, tmp_path: Path) -> None:
    """The buffers of a model that is really loaded are the planned ones."""
    quant = "MXFP4_MOE" if architecture == "gpt-oss" else "Q4_0"
    spec = describe_gguf(write(tmp_path / "m.gguf", blueprint(tiny(architecture), quant)))
    kv_type = "q8_0" if spec.key_dim % 32 == 0 else "f16"
    plan = with_memory(plan_for("llamacpp"), spec, (1024, 512, 2, True, kv_type, kv_type), True)
    engine = factory.create("llamacpp")
    try:
        engine.load(plan)
        found = engine.footprint()
    finally:
        engine.shutdown()
    terms = plan.memory
    assert abs(terms.kv_bytes - found.kv_bytes) <= 3 * LOG_RESOLUTION_BYTES
    scratch = found.compute_bytes + found.output_bytes
    assert abs(terms.compute_bytes - scratch) <= 3 * LOG_RESOLUTION_BYTES
    # Mapped from the first tensor to the last, with the padding between them.
    padding = found.weights_bytes - terms.weights_bytes
    assert -LOG_RESOLUTION_BYTES <= padding <= 64 * 1024


def test_a_wrong_plan_is_named(tmp_path: Path) -> None:
    """Every term that differs gives one sentence with both figures."""
    spec = describe_gguf(write(tmp_path / "m.gguf", blueprint(tiny("llama"), "Q8_0")))
    plan = with_memory(plan_for("llamacpp"), spec, BATCHES[0], True)
    found = dry_run(plan)
    assert disagreements(plan, found) == []
    wrong = msgspec.structs.replace(
        plan.memory, weights_bytes=plan.memory.weights_bytes + 1, kv_bytes=0,
        compute_bytes=plan.memory.compute_bytes + 5 * MIB,
    )  # fmt: skip
    sentences = disagreements(msgspec.structs.replace(plan, memory=wrong), found)
    assert [sentence.split()[5] for sentence in sentences] == ["weights", "kv", "compute"]
    assert "is planned as 0.00 MiB, llama.cpp says 4.00 MiB" in sentences[1]


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    """The child's refusal comes back as an error that names the file."""
    plan = plan_for("llamacpp")
    path = tmp_path / "empty.gguf"
    path.write_bytes(b"")
    broken = msgspec.structs.replace(plan.model, paths=(str(path),))
    with pytest.raises(ModelFileError, match=r"empty.gguf: llama.cpp refuses it"):
        dry_run(msgspec.structs.replace(plan, model=broken))
