"""`python -m brim.bench.standin.child`: loads one model as planned, times it, reads its memory.

A process of its own, because what it holds is to be read off the whole process and thread settings
count from the moment that a backend's libraries are loaded.  The job comes as JSON on standard
input, what was found goes as JSON to standard output.
"""

import os
import subprocess
import sys
import time

import msgspec

from brim.bench.speed import SAMPLING, Case, Row, measure
from brim.core.answer import ErrorInfo
from brim.core.memory import Footprint
from brim.core.plan import Plan
from brim.core.step import Feed, StepPlan
from brim.engine import factory
from brim.engine.base import Engine
from brim.errors import BrimError, EngineError
from brim.machine.process import process_memory
from brim.machine.process_memory import ProcessMemory
from brim.runtime.worker_start import exit_in_words, worker_environment


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What to load and what to time on it."""

    plan: Plan
    cases: tuple[Case, ...]
    """The first one is a prompt."""
    repetitions: int
    max_fill_s: float
    """The context is filled before memory is read unless that would take longer: scratch memory
    is touched as far as a sequence is deep."""


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """What the child answers; `error` is set where there is nothing else."""

    rows: tuple[Row, ...] = ()
    """One for each case, in order."""
    load_s: float = 0.0
    footprint: Footprint | None = None
    """By the backend's own account."""
    num_filled_tokens: int = 0
    """In the context when memory was read."""
    memory: ProcessMemory | None = None
    """By the system's account, after everything was timed; None where it does not say."""
    error: ErrorInfo | None = None


def run_job(job: Job) -> Found:
    """Run a job in a child process and wait for it.

    Raises:
        BrimError: What the engine said, or EngineError where the process died.
    """
    child = subprocess.run(
        [sys.executable, "-P", "-m", "brim.bench.standin.child"],
        input=msgspec.json.encode(job),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=worker_environment(job.plan, os.environ),
        check=False,
    )
    if child.returncode or not child.stdout:
        raise EngineError(
            f"{job.plan.engine}: the process that measured the stand-in "
            f"{exit_in_words(child.returncode)}; try fewer layers or a shorter context"
        )
    found = msgspec.json.decode(child.stdout, type=Found)
    if found.error is not None:
        raise found.error.exception()
    return found


def carry_out(job: Job) -> Found:
    """Load, time, read and unload, in this process."""
    start_s = time.perf_counter()
    engine = factory.create(job.plan.engine)
    try:
        engine.load(job.plan)
        load_s = time.perf_counter() - start_s
        rows = tuple(measure(engine, job.plan, job.cases, repetitions=job.repetitions))
        return Found(
            rows=rows,
            load_s=load_s,
            num_filled_tokens=_fill(engine, job, rows[0].median_ts),
            footprint=engine.footprint(),
            memory=process_memory(os.getpid()),
        )
    finally:
        engine.shutdown()


def _fill(engine: Engine, job: Job, tok_s: float) -> int:
    """Fill one sequence's context, in full chunks; gives how many tokens it then holds."""
    length = job.plan.context_tokens - 1
    if length / tok_s > job.max_fill_s:
        return max(case.num_tokens for case in job.cases)
    seq_id = engine.open(SAMPLING)
    for begin in range(0, length, job.plan.max_batch_tokens):
        rows = min(length - begin, job.plan.max_batch_tokens)
        tokens = tuple(token % engine.tokenizer.vocab_size for token in range(begin, begin + rows))
        engine.step(StepPlan((Feed(seq_id, tokens, sample=begin + rows == length),)))
    return length


def main() -> None:
    """Answer the one job on standard input."""
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    try:
        found = carry_out(job)
    except BrimError as error:
        found = Found(error=ErrorInfo.of(error))
    sys.stdout.buffer.write(msgspec.json.encode(found))


if __name__ == "__main__":
    main()
