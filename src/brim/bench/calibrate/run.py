"""Carries out a whole calibration: stand-ins, jobs in rounds, disk, and the fit."""

import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path

import msgspec

from brim.bench.calibrate import standins, suite
from brim.bench.calibrate.child import Order, Ran
from brim.bench.calibrate.fit import fit_costs, fit_load
from brim.bench.calibrate.process import MeasuringProcess
from brim.bench.calibrate.readiness import MAX_BUSY
from brim.bench.calibrate.suite import Job
from brim.core.calibration import (
    HUGE_PAGES,
    WAIT_POLICIES,
    BandwidthSample,
    Calibration,
    LoadSample,
    LoadSetting,
    OptionRate,
    SpeedSample,
)
from brim.core.machine import Conditions, MachineSpec
from brim.core.memory import MemoryTerms
from brim.core.model import ModelSpec
from brim.core.plan import Objective, Plan
from brim.errors import ConfigError
from brim.machine.disk import disk_read_rate
from brim.planner.shape import speed_shape
from brim.registry.describe import describe_gguf

ROUNDS = 2
"""Times that every job is run, the whole list in between: what disturbs one round for a few
seconds is over in the next."""

Progress = Callable[[float, str], None]
"""Called with the share of the work that is done, 0 to 1, and what comes next."""

MAX_DISTURBED = 0.1
"""Share of jobs that may be disturbed without a word: the other round and the fit's weights make up
for them."""

SPARE_BYTES = 512 * 1024 * 1024
"""Disk that is needed beside the stand-ins: filled KV of 150 MB, and some for everybody else."""


class Subject(msgspec.Struct, frozen=True, kw_only=True):
    """What is calibrated."""

    machine: MachineSpec
    engine: str
    engine_version: str
    conditions: Conditions
    warnings: tuple[str, ...] = ()
    """Why it would have been refused."""


class Measured(msgspec.Struct, kw_only=True):
    """What has been measured so far."""

    samples: list[SpeedSample] = []
    loads: list[LoadSample] = []
    start_s: float = 0.0
    """From starting a process to its first loaded model, above a later load of it."""
    num_disturbed: int = 0
    """Jobs during which other programs were busy, in every attempt."""


def calibrate(
    subject: Subject,
    directory: Path,
    *,
    bandwidth: Sequence[BandwidthSample],
    rounds: int = ROUNDS,
    paths: Mapping[str, Path] | None = None,
    jobs: Sequence[Job] | None = None,
    progress: Progress = lambda _share, _next: None,
    clock: Callable[[], float] = time.time,
) -> Calibration:
    """Measure the machine; takes about a minute.

    Args:
        subject: The machine and the engine.
        directory: Where stand-ins and KV are kept meanwhile; the caller removes it.
        bandwidth: Of the memory, as measured before.
        rounds: Times that each job is run.
        paths: Stand-ins by name that are there already; made here unless given.
        jobs: What to time; the whole suite unless given.
        progress: Told before each job.
        clock: Of seconds since 1970.

    Raises:
        ConfigError: The disk has too little room.
        OSError: The stand-ins could not be written.
        BrimError: The engine failed.
    """
    begin_s = clock()
    if paths is None:
        check_disk(directory)
        paths = standins.write_all(directory, lambda name: progress(0.0, name))
    specs = {name: describe_gguf(path) for name, path in paths.items()}
    if jobs is None:
        jobs = suite.jobs(subject.machine)
    measured = Measured()
    _run_all(subject, specs, jobs, rounds, directory, measured, progress)
    largest = max(paths.values(), key=lambda path: path.stat().st_size)
    base = suite.base_setting(subject.machine)
    return Calibration(
        machine=subject.machine.name,
        ram_bytes=subject.machine.ram_bytes,
        performance_cores=subject.machine.performance_cores,
        engine=subject.engine,
        engine_version=subject.engine_version,
        measured_unix_s=clock(),
        duration_s=clock() - begin_s,
        conditions=subject.conditions,
        warnings=(*subject.warnings, *_disturbance(measured, rounds * len(jobs))),
        bandwidth=tuple(bandwidth),
        base=base,
        options=tuple(option_rates(measured.samples)),
        costs=fit_costs(measured.samples),
        load=fit_load(
            measured.loads, start_s=measured.start_s, disk_bytes_per_s=disk_read_rate(largest)
        ),
        samples=tuple(measured.samples),
        load_samples=tuple(measured.loads),
    )


def _disturbance(measured: Measured, num_jobs: int) -> tuple[str, ...]:
    """A warning where other programs were busy in more than a few jobs."""
    if measured.num_disturbed <= num_jobs * MAX_DISTURBED:
        return ()
    return (f"other programs were busy during {measured.num_disturbed} of {num_jobs} measurements",)


def check_disk(directory: Path) -> None:
    """Make sure that the stand-ins have room.

    Raises:
        ConfigError: They have not; says how much is missing where.
    """
    needed = standins.needed_bytes() + SPARE_BYTES
    if (free := shutil.disk_usage(directory).free) < needed:
        raise ConfigError(
            f"calibrating writes {needed / 1e9:.1f} GB to {directory} for a minute, which has "
            f"{free / 1e9:.1f} GB free; make room, or set XDG_CACHE_HOME to a directory that has"
        )


def _run_all(
    subject: Subject,
    specs: Mapping[str, ModelSpec],
    jobs: Sequence[Job],
    rounds: int,
    directory: Path,
    measured: Measured,
    progress: Progress,
) -> None:
    todo = [(number, job) for number in range(rounds) for job in jobs]
    whole, done = sum(job.weight for _, job in todo), 0.0
    # One process for each environment: thread settings count from its start.
    for _, group in groupby(todo, key=lambda item: (item[0], item[1].setting.wait_policy)):
        batch = [job for _, job in group]
        first = _job_plan(subject, specs[batch[0].model], batch[0])
        begin_s = time.perf_counter()
        with MeasuringProcess(first) as process:
            process.run(Order(plan=first))
            first_s = time.perf_counter() - begin_s
            again = process.run(Order(plan=first))
            measured.start_s = max(measured.start_s, first_s - again.load_s)
            for job in batch:
                progress(done / whole, _label(job))
                order = _order(subject, specs[job.model], job, directory)
                ran, others = process.run_quietly(order)
                measured.num_disturbed += others > MAX_BUSY
                _keep(measured, specs[job.model], job, ran)
                done += job.weight
    progress(1.0, "disk and fit")


def _label(job: Job) -> str:
    setting = job.setting
    words = [job.model, f"{setting.num_threads}/{setting.num_batch_threads} threads"]
    if setting.wait_policy != "passive":
        words.append(setting.wait_policy)
    if setting.repack_weights:
        words.append("repacked")
    if job.kept_kv:
        words.append(f"KV {setting.kv_type_k}/{setting.kv_type_v}")
    return ", ".join(words)


def _order(subject: Subject, spec: ModelSpec, job: Job, directory: Path) -> Order:
    return Order(
        plan=_job_plan(subject, spec, job),
        prompts=job.prompts,
        depths=job.depths,
        num_generate=job.num_generate,
        only_repacked=job.setting.repack_weights,
        kept_kv=str(directory / f"{job.kept_kv}.kv") if job.kept_kv else "",
        refill=job.fills,
    )


def _job_plan(subject: Subject, spec: ModelSpec, job: Job) -> Plan:
    return plan_of(subject.engine, spec, job.setting, job.num_tokens)


def plan_of(engine: str, spec: ModelSpec, setting: LoadSetting, num_tokens: int) -> Plan:
    """A plan for one sequence of `num_tokens` under a setting, without a grant of memory."""
    return Plan(
        model=spec,
        engine=engine,
        objective=Objective.DECODE,
        context_tokens=num_tokens,
        kv_tokens=num_tokens,
        max_sequences=1,
        max_batch_tokens=setting.micro_batch_tokens,
        micro_batch_tokens=setting.micro_batch_tokens,
        kv_type_k=setting.kv_type_k,
        kv_type_v=setting.kv_type_v,
        flash_attention=setting.flash_attention,
        repack_weights=setting.repack_weights,
        num_threads=setting.num_threads,
        num_batch_threads=setting.num_batch_threads,
        environment={
            **WAIT_POLICIES[setting.wait_policy],
            **HUGE_PAGES,
            "OMP_NUM_THREADS": str(setting.num_batch_threads),
        },
        # The caller has seen to it that there is room; nothing here is granted by these terms.
        memory=MemoryTerms(weights_bytes=0, kv_bytes=0, compute_bytes=0, overhead_bytes=0),
        reasons={},
    )


def _keep(measured: Measured, spec: ModelSpec, job: Job, ran: Ran) -> None:
    measured.loads.append(
        LoadSample(
            model=job.model,
            weights_bytes=spec.weights_bytes,
            vocab_size=spec.vocab_size,
            repacked_bytes=ran.dirty_weights_bytes,
            seconds=ran.load_s,
        )
    )
    for timed in (*ran.prefill, *ran.decode):
        measured.samples.append(
            SpeedSample(
                model=job.model,
                shape=speed_shape(spec),
                setting=job.setting,
                num_prompt=timed.num_prompt,
                num_generate=0 if timed.num_prompt else job.num_generate,
                depth=timed.depth,
                samples_s=timed.samples_s,
            )
        )


def option_rates(samples: Iterable[SpeedSample]) -> list[OptionRate]:
    """Decode at the largest depth and the longest prompt of each stand-in and setting."""
    groups: dict[tuple[str, LoadSetting], list[SpeedSample]] = {}
    for sample in samples:
        groups.setdefault((sample.model, sample.setting), []).append(sample)
    rates = []
    for (model, setting), found in groups.items():
        decoded = [sample for sample in found if not sample.num_prompt]
        read = [sample for sample in found if sample.num_prompt]
        depth = max((sample.depth for sample in decoded), default=0)
        longest = max((sample.num_prompt for sample in read if not sample.depth), default=0)
        rates.append(
            OptionRate(
                model=model,
                setting=setting,
                depth=depth,
                num_prompt=longest,
                decode_tok_s=max((s.tok_s for s in decoded if s.depth == depth), default=None),
                prefill_tok_s=max(
                    (s.tok_s for s in read if s.num_prompt == longest and not s.depth),
                    default=None,
                ),
            )
        )
    return rates
