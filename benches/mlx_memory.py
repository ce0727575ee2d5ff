"""What MLX holds once a model's pool is full, beside what was planned before it was loaded.

Models of random weights, one for each way in which a cache can be kept, are planned as any other
and loaded by the engine, each in a process of its own.  Sequences are admitted until the pool is
shared out, prompts fill it, and a few tokens are decoded together.  Then MLX says what is active
and what was at most, and the kernel what of the process is anonymous memory.  The aim is a forecast
of active memory within 3 %, and a peak and a process within what was granted.

    python benches/mlx_memory.py [NAME ...] [--json FILE] [--dir DIRECTORY]
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from brim.core.machine import MachineSpec
from brim.core.memory import MemoryTerms
from brim.core.plan import Plan
from brim.core.sampling import SamplingParams
from brim.core.step import Feed, StepPlan
from brim.engine import factory
from brim.engine.base import Engine
from brim.planner.mlx_memory import freed_arrays_limit_bytes
from brim.planner.plan import make_plan
from brim.registry.describe_safetensors import describe_directory

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from support.mlx_models import make_model_dir

AIM_PERCENT = 3.0
MIB = 1024**2
NUM_DECODED = 6

MACHINE = MachineSpec(name="bench", system="linux", ram_bytes=32 * 2**30, others_bytes=0)
"""Plans are for a processor, whatever machine this is: MLX's build for Linux has no GPU."""


class Case(NamedTuple):
    """One model and how it is planned."""

    family: str
    dtype: str
    sizes: dict[str, Any]
    kv_type: str = "f16"
    context_tokens: int = 1024
    max_sequences: int = 4


WIDE_KV = {"hidden_size": 512, "num_hidden_layers": 10, "intermediate_size": 1024,
           "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128}  # fmt: skip
"""82 MB of bf16 weights with their embeddings, and 40 KiB of KV a token."""

CASES = {
    "dense": Case("qwen3", "bfloat16", WIDE_KV, max_sequences=1),
    "dense-q8_0": Case("qwen3", "bfloat16", WIDE_KV, kv_type="q8_0"),
    "windows": Case(
        "gemma3_text", "bfloat16",
        WIDE_KV | {"num_hidden_layers": 12, "sliding_window": 256, "sliding_window_pattern": 6},
    ),
    # On a processor MLX computes experts in f32 alone.
    "experts": Case(
        "qwen3_moe", "float32",
        {"hidden_size": 512, "num_hidden_layers": 6, "num_experts": 16, "num_experts_per_tok": 2,
         "moe_intermediate_size": 384, "num_attention_heads": 8, "num_key_value_heads": 4},
    ),
    "hybrid": Case(
        "falcon_h1", "bfloat16",
        {"hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1024,
         "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 128,
         "mamba_n_heads": 16, "mamba_d_head": 64, "mamba_d_ssm": 1024, "mamba_d_state": 128},
        context_tokens=512,
    ),
}  # fmt: skip


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One load: what was planned, what MLX and the kernel say."""

    name: str
    kv_type: str
    kv_tokens: int
    num_sequences: int
    planned: MemoryTerms
    active_bytes: int
    peak_bytes: int
    anonymous_bytes: int
    """Of the whole process; MLX's arrays, the interpreter and the libraries' own data."""

    @property
    def planned_active_bytes(self) -> int:
        """Weights and caches; results of the last step are under a megabyte."""
        return self.planned.weights_bytes + self.planned.kv_bytes

    @property
    def planned_peak_bytes(self) -> int:
        """With all that one evaluation has in use."""
        scratch = self.planned.compute_bytes - freed_arrays_limit_bytes(self.planned.compute_bytes)
        return self.planned_active_bytes + scratch

    @property
    def error_percent(self) -> float:
        """Of the active memory: planned minus measured."""
        return 100 * (self.planned_active_bytes / self.active_bytes - 1)

    @property
    def is_within_aim(self) -> bool:
        """Whether active memory was forecast, and nothing took more than was granted."""
        return (
            abs(self.error_percent) <= AIM_PERCENT
            and self.peak_bytes <= self.planned_peak_bytes
            and self.anonymous_bytes <= self.planned.total_bytes
        )


def plan_of(case: Case, model_dir: Path) -> Plan:
    """The plan of a case, for a processor."""
    return make_plan(
        describe_directory(model_dir),
        MACHINE,
        engine="mlx",
        context_tokens=case.context_tokens,
        max_sequences=case.max_sequences,
        kv_type=case.kv_type,
    )


def measure(name: str, case: Case, model_dir: Path) -> Row:
    """Load, fill and decode in this process, which must have done nothing with MLX before."""
    plan = plan_of(case, model_dir)
    os.environ.update(plan.environment)
    engine = factory.create("mlx")
    engine.load(plan)
    fill(engine, plan)
    import mlx.core as mx

    # The pass that was launched ahead has arrays of its own until it has ended.
    mx.synchronize()
    return Row(
        name=name,
        kv_type=plan.kv_type_k,
        kv_tokens=plan.kv_tokens,
        num_sequences=plan.max_sequences,
        planned=plan.memory,
        active_bytes=mx.get_active_memory(),
        peak_bytes=mx.get_peak_memory(),
        anonymous_bytes=anonymous_bytes(),
    )


def fill(engine: Engine, plan: Plan) -> None:
    """Share the pool out, fill it with prompts, and decode to its last tokens, all together."""
    bounds = shares(plan.kv_tokens, plan.max_sequences, plan.context_tokens)
    sampling = SamplingParams(temperature=0.0)
    ids = [engine.open(sampling, max_tokens=bound) for bound in bounds]
    rng = random.Random(0)
    drawn: dict[int, int] = {}
    for seq_id, bound in zip(ids, bounds, strict=True):
        prompt = rng.choices(range(3, plan.model.vocab_size), k=bound - NUM_DECODED)
        for start in range(0, len(prompt), plan.max_batch_tokens):
            piece = prompt[start : start + plan.max_batch_tokens]
            is_last = start + len(piece) == len(prompt)
            for one in engine.step(StepPlan([Feed(seq_id, piece, is_last)])).sampled:
                drawn[one.seq_id] = one.token
    for _ in range(NUM_DECODED - 1):
        result = engine.step(StepPlan([Feed(seq_id, [drawn[seq_id]]) for seq_id in ids]))
        drawn = {one.seq_id: one.token for one in result.sampled}


def shares(kv_tokens: int, num_sequences: int, context_tokens: int) -> list[int]:
    """Bounds that take the whole pool, and of their blocks as much as bounds can."""
    bound = min(context_tokens, kv_tokens // num_sequences // 64 * 64 + 1)
    bounds = [bound] * (num_sequences - 1)
    return [*bounds, min(context_tokens, kv_tokens - sum(bounds))]


def anonymous_bytes() -> int:
    """What of this process only swap could take; 0 where the kernel does not say."""
    path = Path("/proc/self/smaps_rollup")
    if not path.exists():
        return 0
    for line in path.read_text().splitlines():
        if line.startswith("Pss_Anon:"):
            return int(line.split()[1]) * 1024
    return 0


def in_child(*arguments: str) -> str:
    """Standard output of this script with other arguments, in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, *arguments], stdout=subprocess.PIPE, check=True, text=True
    )
    return done.stdout


def run(names: list[str], parent: Path) -> list[Row]:
    """Every case in processes of its own: one writes the model, the next measures."""
    rows = []
    for name in names:
        model_dir = parent / name
        in_child("--write", name, "--dir", str(model_dir))
        found = in_child("--measure", name, "--dir", str(model_dir))
        rows.append(msgspec.json.decode(found.splitlines()[-1], type=Row))
        print_row(rows[-1])
    return rows


def print_row(row: Row) -> None:
    def mib(num_bytes: int) -> str:
        return f"{num_bytes / MIB:8.1f}"

    print(
        f"{row.name:12} {row.kv_type:5} {row.kv_tokens:6} x{row.num_sequences:<3}"
        f"active {mib(row.planned_active_bytes)} {mib(row.active_bytes)} "
        f"({row.error_percent:+5.2f} %)  peak {mib(row.planned_peak_bytes)} {mib(row.peak_bytes)}"
        f"  process {mib(row.planned.total_bytes)} {mib(row.anonymous_bytes)}"
        f"{'' if row.is_within_aim else '  OUTSIDE THE AIM'}",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*CASES, []], help="all cases unless given")
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--dir", type=Path, help="where models are written; temporary unless given")
    parser.add_argument("--write", help=argparse.SUPPRESS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.write:
        case = CASES[asked.write]
        if not asked.dir.exists():
            make_model_dir(asked.dir, case.family, dtype=case.dtype, **case.sizes)
        return 0
    if asked.measure:
        row = measure(asked.measure, CASES[asked.measure], asked.dir)
        print(msgspec.json.encode(row).decode())
        return 0
    print("planned and measured, MiB")
    with tempfile.TemporaryDirectory(prefix="brim-mlx-memory-") as temporary:
        rows = run(asked.names or list(CASES), asked.dir or Path(temporary))
    if asked.json is not None:
        asked.json.write_text(json.dumps(msgspec.to_builtins(rows), indent=1) + "\n")
    return 0 if all(row.is_within_aim for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
