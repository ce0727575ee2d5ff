"""What would make a model fit is said in the words of the engine that runs it."""

from brim.core.machine import MachineSpec
from brim.core.model import ModelSpec
from brim.ledger.budget import Limit
from brim.ledger.ways import ways_to_fit
from brim.planner.plan import make_plan


def test_a_smaller_form_for_mlx_is_named_as_mlx_names_it(machine: MachineSpec) -> None:
    """A checkpoint that does not fit is not sent after a GGUF recipe that MLX cannot read."""
    model = ModelSpec(
        name="big", paths=(), format="safetensors", architecture="qwen3", fingerprint="f",
        num_parameters=8_000_000_000, weights_bytes=16_000_000_000, num_layers=36,
        hidden_size=4096, num_heads=32, num_kv_heads=(8,) * 36, key_dim=128, value_dim=128,
        vocab_size=151_936, trained_context_tokens=32_768, quant="BF16",
    )  # fmt: skip
    plan = make_plan(model, machine, engine="mlx", context_tokens=4096)
    limit = Limit(12_000_000_000, "gpu limit")
    ways = ways_to_fit(plan, limit, {}, machine, asked_bytes=plan.memory.total_bytes)
    assert any("MLX 8bit" in way for way in ways)
    assert not any("weights mapped" in way for way in ways)
