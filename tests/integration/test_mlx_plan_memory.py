"""What MLX holds once a model's pool is shared out, beside what was planned before it was loaded.

A small sibling of benches/mlx_memory.py, whose models are large enough for published figures.
"""

import gc
from pathlib import Path
from typing import Any

import pytest
from conftest import require_engine
from support.driver import GREEDY
from support.mlx_models import make_model_dir

from brim.core.machine import MachineSpec
from brim.core.plan import Plan
from brim.core.step import Feed, StepPlan
from brim.engine import factory
from brim.engine.base import Engine
from brim.planner.mlx_memory import freed_arrays_limit_bytes
from brim.planner.plan import make_plan
from brim.registry.describe_safetensors import describe_directory

TOLERANCE = 0.03

MACHINE = MachineSpec(name="x", system="linux", ram_bytes=16 * 2**30, others_bytes=0)

WIDE_KV = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 8,
           "head_dim": 128}  # fmt: skip
"""16 KiB of bf16 KV a token beside 5 MB of weights: a wrong byte of either shows."""

WINDOWS = WIDE_KV | {"sliding_window": 128, "sliding_window_pattern": 4}
"""Three of four layers look back 128 tokens."""

CASES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "dense": ("llama", "bfloat16", "f16", WIDE_KV),
    "single": ("llama", "float32", "f16", WIDE_KV),
    "quantised": ("llama", "bfloat16", "q8_0", WIDE_KV),
    "four-bits": ("llama", "float16", "q4_0", WIDE_KV),
    "windows": ("gemma3_text", "bfloat16", "f16", WINDOWS),
    "windows-quantised": ("gemma3_text", "bfloat16", "q8_0", WINDOWS),
    "experts": ("qwen3_moe", "float32", "f16", WIDE_KV),
    "hybrid": ("falcon_h1", "bfloat16", "f16", WIDE_KV | {
        "mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_ssm": 512, "mamba_d_state": 256}),
}  # fmt: skip


def fill(engine: Engine, plan: Plan) -> None:
    """Sequences that take the whole pool, each with a prompt and two tokens drawn together."""
    bound = plan.kv_tokens // plan.max_sequences // 64 * 64 + 1
    bounds = [bound] * (plan.max_sequences - 1)
    bounds.append(plan.kv_tokens - sum(bounds))
    ids = [engine.open(GREEDY, max_tokens=each) for each in bounds]
    for seq_id in ids:
        engine.step(StepPlan([Feed(seq_id, range(5, 25), False)]))
    result = engine.step(StepPlan([Feed(seq_id, [7]) for seq_id in ids]))
    engine.step(StepPlan([Feed(one.seq_id, [one.token]) for one in result.sampled]))


@pytest.mark.parametrize("case", CASES)
def test_active_memory_is_what_was_planned(case: str, tmp_path: Path) -> None:
    """Weights and a pool shared out are within 3 % of the plan, and the peak within its grant."""
    require_engine("mlx")
    import mlx.core as mx

    family, dtype, kv_type, sizes = CASES[case]
    model_dir = make_model_dir(tmp_path / "model", family, dtype=dtype, **sizes)
    plan = make_plan(
        describe_directory(model_dir), MACHINE, engine="mlx", context_tokens=2048,
        max_sequences=3, kv_type=kv_type,
    )  # fmt: skip
    gc.collect()
    mx.synchronize()
    before_bytes = mx.get_active_memory()
    engine = factory.create("mlx")
    engine.load(plan)
    try:
        mx.reset_peak_memory()
        fill(engine, plan)
        peak_bytes = mx.get_peak_memory() - before_bytes
        mx.synchronize()
        gc.collect()
        active_bytes = mx.get_active_memory() - before_bytes
    finally:
        engine.shutdown()
    planned_bytes = plan.memory.weights_bytes + plan.memory.kv_bytes
    assert active_bytes == pytest.approx(planned_bytes, rel=TOLERANCE)
    assert peak_bytes <= planned_bytes + freed_arrays_limit_bytes(plan.memory.compute_bytes)


def test_windows_that_a_prompt_moves_are_granted(tmp_path: Path) -> None:
    """Pieces that move eleven layers' windows at once peak within what the plan grants for it."""
    require_engine("mlx")
    import mlx.core as mx

    sizes = WIDE_KV | {"num_hidden_layers": 12, "sliding_window": 128, "sliding_window_pattern": 12}
    model_dir = make_model_dir(tmp_path / "model", "gemma3_text", dtype="float32", **sizes)
    plan = make_plan(
        describe_directory(model_dir), MACHINE, engine="mlx", context_tokens=1024, max_sequences=1
    )
    gc.collect()
    mx.synchronize()
    before_bytes = mx.get_active_memory()
    engine = factory.create("mlx")
    engine.load(plan)
    try:
        mx.reset_peak_memory()
        seq_id = engine.open(GREEDY, max_tokens=1024)
        for _ in range(2):
            engine.step(StepPlan([Feed(seq_id, range(5, 505), False)]))
        peak_bytes = mx.get_peak_memory() - before_bytes
    finally:
        engine.shutdown()
    planned_bytes = plan.memory.weights_bytes + plan.memory.kv_bytes
    assert peak_bytes <= planned_bytes + freed_arrays_limit_bytes(plan.memory.compute_bytes)
