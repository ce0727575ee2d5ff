"""A machine that measures stand-ins in no time: a fixed cost and a cost for each layer."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import msgspec

from brim.bench.speed import Row
from brim.bench.standin import blueprint, tiny
from brim.bench.standin.child import Found, Job
from brim.core.machine import MachineSpec
from brim.core.memory import Footprint
from brim.core.model import ModelSpec
from brim.core.plan import Plan
from brim.machine.process_memory import ProcessMemory
from brim.planner.plan import make_plan

MODEL = blueprint(tiny("llama", num_layers=16), "Q8_0")

MACHINE = MachineSpec(
    name="test", system="linux", ram_bytes=16 * 10**9, others_bytes=10**9, performance_cores=2
)

FIXED_S, LAYER_S = 0.010, 0.002
"""Of one decoded token."""


def plan_of(spec: ModelSpec) -> Plan:
    return make_plan(spec, MACHINE, engine="llamacpp", context_tokens=256)


def granted_at_once(plan: Plan) -> AbstractContextManager[None]:
    return nullcontext()


def row(case_name: str, seconds: float, num_tokens: int) -> Row:
    rate = num_tokens / seconds
    given: dict[str, object] = {
        "test": case_name, "model_filename": "", "model_type": "", "engine": "llamacpp",
        "type_k": "f16", "type_v": "f16", "flash_attn": False, "repack": False,
        "avg_ts": rate, "median_ts": rate, "min_ts": rate / 1.1, "max_ts": rate * 1.1,
        "stddev_ts": 0.0, "samples_ns": (), "samples_ts": (),
    }  # fmt: skip
    missing = {name: 0 for name in Row.__struct_fields__ if name not in given}
    return msgspec.convert(given | missing, Row)


class Machine:
    """Runs jobs, and notes of which depths."""

    def __init__(self) -> None:
        self.layers: list[int] = []
        self.files: list[Path] = []

    def run(self, job: Job) -> Found:
        depth, weights = job.plan.model.num_layers, job.plan.model.weights_bytes
        self.layers.append(depth)
        (path,) = map(Path, job.plan.model.paths)
        assert path.stat().st_blocks * 512 >= job.plan.model.weights_bytes
        self.files.append(path)
        token_s = FIXED_S + LAYER_S * depth
        prompt, decode = job.cases
        return Found(
            rows=(
                row(prompt.name, prompt.num_prompt * token_s / 4, prompt.num_prompt),
                row(decode.name, decode.num_generate * token_s, decode.num_generate),
            ),
            load_s=1.0 + depth,
            footprint=Footprint(
                weights_bytes=weights,
                mapped_weights_bytes=weights,
                kv_bytes=depth * 64,
                compute_bytes=999,
            ),
            num_filled_tokens=255,
            memory=ProcessMemory(
                dirty_bytes=40_000 + depth * 100, resident_bytes=0, file_bytes=7_000 + weights
            ),
        )
