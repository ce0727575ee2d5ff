"""What a worker holds once its context is full, beside what was planned before it was loaded.

Stand-ins of several sizes and architectures are loaded by real worker processes, at two contexts,
for one sequence and for eight; prompts of random tokens fill the pool and a few tokens are
decoded.  Then /proc/PID/smaps_rollup is read: anonymous memory and mapped files that are resident,
as one total.  The aim is a forecast within 3 % or 32 MiB of it, whichever is larger.

    python benches/footprint.py [NAME ...] [--json FILE] [--dir DIRECTORY]
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from brim.bench.standin import Dimensions, blueprint, write
from brim.core.machine import MachineSpec
from brim.core.plan import Objective, Plan
from brim.core.request import Request
from brim.core.sampling import SamplingParams
from brim.machine.reading import read_machine
from brim.planner.memory import memory_terms
from brim.planner.plan import make_plan
from brim.registry.describe import describe_gguf
from brim.runtime.worker_process import Deltas, WorkerProcess

AIM_PERCENT, AIM_BYTES = 3, 32 * 1024**2
MIB = 1024**2
NUM_DECODED = 4
NUM_SHORT_TOKENS = 12
TICKETS = itertools.count()
CONTEXTS = (1024, 4096)
SEQUENCES = (1, 8)


def llama(layers: int, hidden: int, heads: int, kv_heads: int, feed_forward: int) -> Dimensions:
    """A Llama with heads of 64 values and a vocabulary of 32,000."""
    return Dimensions(
        architecture="llama", num_layers=layers, hidden_size=hidden, vocab_size=32_000,
        num_heads=heads, num_kv_heads=kv_heads, head_dim=64, feed_forward_size=feed_forward,
    )  # fmt: skip


MODELS: dict[str, tuple[Dimensions, str, Objective]] = {
    # Shapes of published models; the objective decides about repacking, flash attention and KV.
    "llama-0.1b-q8_0": (llama(12, 768, 12, 4, 2048), "Q8_0", Objective.MEMORY),
    "qwen2-0.5b-q4_k_m": (
        Dimensions(
            architecture="qwen2", num_layers=24, hidden_size=896, vocab_size=151_936, num_heads=14,
            num_kv_heads=2, head_dim=64, feed_forward_size=4864, is_tied=True, has_qkv_bias=True,
        ),
        "Q4_K_M",
        Objective.DECODE,
    ),
    "gemma3-1b-q4_0": (
        Dimensions(
            architecture="gemma3", num_layers=26, hidden_size=1152, vocab_size=262_144, num_heads=4,
            num_kv_heads=1, head_dim=256, feed_forward_size=6912, is_tied=True, window_tokens=512,
        ),
        "Q4_0",
        Objective.PREFILL,
    ),
    "llama-1.2b-q4_k_m": (llama(16, 2048, 32, 8, 8192), "Q4_K_M", Objective.DECODE),
    "qwen3moe-2b-q4_k_m": (
        Dimensions(
            architecture="qwen3moe", num_layers=12, hidden_size=1024, vocab_size=151_936,
            num_heads=16, num_kv_heads=4, head_dim=128, feed_forward_size=3072, num_experts=64,
            num_active_experts=4, expert_feed_forward_size=768,
        ),
        "Q4_K_M",
        Objective.PREFILL,
    ),
    "llama-3.2b-q4_k_m": (
        Dimensions(
            architecture="llama", num_layers=28, hidden_size=3072, vocab_size=128_256, num_heads=24,
            num_kv_heads=8, head_dim=128, feed_forward_size=8192, is_tied=True,
        ),
        "Q4_K_M",
        Objective.MEMORY,
    ),
}  # fmt: skip


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One load: what was planned, what the process held."""

    model: str
    context_tokens: int
    num_sequences: int
    kv_type: str
    flash_attention: bool
    repack: bool
    planned_bytes: int
    """`MemoryTerms.resident_bytes`."""
    reserved_bytes: int
    """`MemoryTerms.total_bytes`, what the ledger grants."""
    measured_bytes: int
    anonymous_bytes: int
    planned_anonymous_bytes: int

    @property
    def error_bytes(self) -> int:
        """Planned minus measured."""
        return self.planned_bytes - self.measured_bytes

    @property
    def is_within_aim(self) -> bool:
        """Whether the error is at most 3 % or 32 MiB."""
        allowed = max(AIM_BYTES, self.measured_bytes * AIM_PERCENT // 100)
        return abs(self.error_bytes) <= allowed


def plan_of(
    path: Path, machine: MachineSpec, context: int, sequences: int, goal: Objective
) -> Plan:
    """A plan whose pool is exactly `context` tokens, so that it can be filled."""
    plan = make_plan(
        describe_gguf(path), machine, engine="llamacpp", objective=goal, context_tokens=context,
        max_sequences=sequences,
    )  # fmt: skip
    if plan.kv_tokens == context:
        return plan
    names = ("kv_type_k", "kv_type_v", "micro_batch_tokens", "flash_attention", "repack_weights")
    options: dict[str, Any] = {name: getattr(plan, name) for name in names}
    memory = memory_terms(
        plan.model, engine="llamacpp", kv_tokens=context, max_sequences=sequences, **options
    )
    return msgspec.structs.replace(plan, kv_tokens=context, memory=memory)


async def fill(plan: Plan) -> dict[str, int]:
    """Load a plan in a worker, fill its pool, and read what the process holds.

    All sequences but one answer short prompts at once; then the last one's prompt takes the whole
    pool, in whole micro-batches up to its end: that is what scratch memory is reserved for.
    """
    finished: asyncio.Queue[None] = asyncio.Queue()

    def note(deltas: Deltas) -> None:
        for _, delta in deltas:
            if delta.finish_reason is not None:
                finished.put_nowait(None)

    worker = await WorkerProcess.spawn(plan, note)
    try:
        await worker.load(plan)
        short = [NUM_SHORT_TOKENS] * (plan.max_sequences - 1)
        for lengths in (short, [plan.kv_tokens - NUM_DECODED]):
            for length in lengths:
                await start(worker, plan, length)
            for _ in lengths:
                await finished.get()
        return rollup(worker.pid)
    finally:
        await worker.terminate()


async def start(worker: WorkerProcess, plan: Plan, num_prompt_tokens: int) -> None:
    """One request of random tokens."""
    ticket = next(TICKETS)
    rng = random.Random(ticket)
    tokens = tuple(rng.randrange(300, plan.model.vocab_size) for _ in range(num_prompt_tokens))
    request = Request(
        request_id=str(ticket), model=plan.model.name, prompt_tokens=tokens,
        sampling=SamplingParams(temperature=0.0, ignore_eos=True),
    )  # fmt: skip
    await worker.prepare(ticket, request)
    worker.start(ticket, NUM_DECODED)


def rollup(pid: int) -> dict[str, int]:
    """The process's smaps_rollup, in bytes."""
    found = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, value, *_ = line.split()
        found[name.rstrip(":")] = int(value) * 1024
    return found


def measure(name: str, path: Path, machine: MachineSpec) -> Iterator[Row]:
    """All contexts and sequences of one model."""
    goal = MODELS[name][2]
    for context in CONTEXTS:
        for sequences in SEQUENCES:
            plan = plan_of(path, machine, context, sequences, goal)
            held = asyncio.run(fill(plan))
            terms = plan.memory
            yield Row(
                model=name, context_tokens=context, num_sequences=sequences,
                kv_type=plan.kv_type_k, flash_attention=plan.flash_attention,
                repack=plan.repack_weights, planned_bytes=terms.resident_bytes,
                reserved_bytes=terms.total_bytes,
                # Libraries that other processes map as well count in proportion.
                measured_bytes=held["Pss"],
                anonymous_bytes=held["Anonymous"],
                planned_anonymous_bytes=terms.resident_bytes - terms.mapped_bytes,
            )  # fmt: skip


def show(row: Row) -> None:
    """One line of the table."""
    error, percent = row.error_bytes / MIB, 100 * row.error_bytes / row.measured_bytes
    options = (
        f"{row.kv_type}{' fa' if row.flash_attention else ''}{' repack' if row.repack else ''}"
    )
    print(
        f"{row.model:20} {row.context_tokens:6} {row.num_sequences:3} {options:14} "
        f"{row.reserved_bytes / MIB:9.1f} {row.planned_bytes / MIB:9.1f} "
        f"{row.measured_bytes / MIB:9.1f} {error:+8.1f} {percent:+6.2f} % "
        f"(anonymous {row.planned_anonymous_bytes / MIB:.1f} / {row.anonymous_bytes / MIB:.1f})"
        f"{'' if row.is_within_aim else '  over the aim'}",
        flush=True,
    )


def main() -> int:
    """Print the table; the exit code is 1 where a row is over the aim."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="models; all unless named")
    parser.add_argument("--json", type=Path, help="write the rows there as well")
    parser.add_argument("--dir", type=Path, help="where stand-ins are made; removed afterwards")
    arguments = parser.parse_args()
    machine, rows = read_machine(), []
    print("model                context seq options    reserved   planned  measured    error (MiB)")
    for name in arguments.names or MODELS:
        dimensions, quant, _ = MODELS[name]
        with tempfile.TemporaryDirectory(dir=arguments.dir, prefix="footprint-") as scratch:
            path = write(Path(scratch) / f"{name}.gguf", blueprint(dimensions, quant))
            for row in measure(name, path, machine):
                show(row)
                rows.append(row)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(msgspec.to_builtins(rows), indent=1) + "\n")
    over = sum(not row.is_within_aim for row in rows)
    print(f"{len(rows) - over} of {len(rows)} within {AIM_PERCENT} % or {AIM_BYTES // MIB} MiB")
    return 1 if over else 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
