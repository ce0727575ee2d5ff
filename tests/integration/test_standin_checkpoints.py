"""Every kind of stand-in checkpoint loads in MLX, holds what its plan says, and decodes."""

from pathlib import Path

import numpy as np
import pytest
from conftest import require_engine

from brim.bench.speed import Case, measure
from brim.bench.standin import tiny
from brim.bench.standin.checkpoint import ARCHITECTURES, checkpoint, write_checkpoint
from brim.core.machine import MachineSpec
from brim.core.sampling import SamplingParams
from brim.core.step import Feed, StepPlan
from brim.engine import factory
from brim.planner.plan import make_plan
from brim.registry.describe_safetensors import describe_directory

MACHINE = MachineSpec(
    name="test", system="linux", ram_bytes=16 * 10**9, others_bytes=10**9, performance_cores=2
)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_packed_stand_in_decodes(tmp_path: Path, architecture: str) -> None:
    """Logits are finite and differ, so that speed is that of a model that works."""
    require_engine("mlx")
    dimensions = tiny(architecture, num_layers=2, vocab_size=300)
    directory = write_checkpoint(tmp_path / "m", checkpoint(dimensions, "MLX 4bit"))
    plan = make_plan(
        describe_directory(directory), MACHINE, engine="mlx", context_tokens=64, max_sequences=2
    )
    engine = factory.create("mlx")
    engine.load(plan)
    try:
        assert engine.footprint().weights_bytes == plan.model.weights_bytes
        seq_id = engine.open(SamplingParams(temperature=0.0))
        engine.step(StepPlan([Feed(seq_id, [1, 2, 3])]))
        logits = engine.logits(seq_id)
        assert np.isfinite(logits).all()
        assert logits.std() > 0.1
        engine.close(seq_id)
        case = Case(num_generate=2, num_sequences=2, depth=4)
        (row,) = measure(engine, plan, [case], repetitions=1)
        assert row.median_ts > 0
    finally:
        engine.shutdown()
