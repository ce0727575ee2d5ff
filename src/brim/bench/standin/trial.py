"""Builds a stand-in, or two slices of it, measures them here and says what the whole would do.

Files are made in a temporary directory and removed again; the disk's and the machine's room are
looked at first.  What was scaled is part of the report.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import msgspec
import psutil

from brim.bench.speed import Case, Row
from brim.bench.standin.child import Found, Job, run_job
from brim.bench.standin.forms import Buildable, Form, form_of
from brim.bench.standin.slices import Depths, depths, extrapolated
from brim.core.memory import Footprint
from brim.core.model import ModelSpec
from brim.core.plan import Plan
from brim.errors import DoesNotFit, InvalidRequest

MAX_FILE_BYTES = 6 * 2**30
"""A larger model is measured in slices unless layers are asked for: writing 6 GiB takes 10 to 60
seconds, and layers behind the first few gigabytes tell nothing new."""

FOLDER_PREFIX = "standin-"
"""Before the number of the process that builds."""

DISK_RESERVE_BYTES = 2 * 2**30
"""Left free on the disk that the stand-in is made on: others write there too."""

MAX_FILL_S = 30.0
"""Most that filling the context may take, by the prompt's rate, before memory is read."""

MakePlan = Callable[[ModelSpec], Plan]
"""How a model would be loaded."""

Admit = Callable[[Plan], AbstractContextManager[object]]
"""Holds a grant for what is built and loaded inside; raises where there is no room for it."""

Run = Callable[[Job], Found]
Progress = Callable[[str], None]


class Seconds(msgspec.Struct, frozen=True):
    """A time: the quickest run, the median and the slowest; scaled, what they could come to."""

    quickest: float
    median: float
    slowest: float


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What one file did, or what the whole is worked out to do."""

    num_layers: int
    weights_bytes: int
    prefill_s: Seconds
    """Of the whole prompt."""
    decode_s: Seconds
    """Of one token."""
    load_s: float
    num_filled_tokens: int
    """In the context when memory was read."""
    dirty_bytes: int | None
    """Anonymous memory of the process; None where the system does not say."""
    file_bytes: int | None
    """File pages in RAM, mapped weights above all."""
    footprint: Footprint
    """By the backend's own account."""


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """A measured stand-in."""

    spec: ModelSpec
    """The whole model."""
    plan: Plan
    """How the whole would be loaded."""
    whole: Measured
    """Measured, or worked out from `slices`."""
    slices: tuple[Measured, ...] = ()
    """The two that were measured instead of the whole, shallow first."""
    scaled: dict[str, str] = {}
    """Figure -> how it was worked out; empty where the whole was measured."""
    num_prompt_tokens: int
    num_generated_tokens: int
    depth_tokens: int


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What to measure."""

    num_prompt: int = 512
    num_generate: int = 32
    depth: int = 0
    repetitions: int = 3
    layers: int | None = None
    """The most layers to build; None: all of them if they fit."""
    max_bytes: int = MAX_FILE_BYTES
    """The largest file to build where `layers` is None."""

    @property
    def cases(self) -> tuple[Case, Case]:
        """A prompt from an empty context, and decoding at the depth."""
        return (
            Case(num_prompt=self.num_prompt),
            Case(num_generate=self.num_generate, depth=self.depth),
        )


def try_model(
    model: Buildable,
    wanted: Wanted,
    make_plan: MakePlan,
    admit: Admit,
    *,
    name: str,
    directory: Path,
    run: Run = run_job,
    progress: Progress = lambda _: None,
) -> Trial:
    """Measure a stand-in of `model` on this machine.

    Args:
        model: The whole of it.
        wanted: What to measure.
        make_plan: Plans a model.
        admit: Entered before a file is built, and left when it is gone; the whole of a model that
            is scaled is never granted.
        name: What the model is called in messages.
        directory: Where to build: a place on a disk, since what lies in a file system in memory
            would be counted twice.
        run: Runs a job; the tests' own.
        progress: Told what is done.

    Raises:
        DoesNotFit: The disk has no room.
        InvalidRequest: So few layers say nothing about the whole.
        BrimError: What `make_plan`, `admit` and the engine raise.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _remove_left_behind(directory)
    prefix = f"{FOLDER_PREFIX}{os.getpid()}-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=directory) as folder:
        place, form = Path(folder), form_of(model)
        spec = _described(form, place / "whole", name)
        at = _depths(form, spec, wanted)
        plan = make_plan(spec)

        def plan_of_slice(part: ModelSpec) -> Plan:
            # The whole model's load options: they are what the slices stand for.
            return msgspec.structs.replace(plan, model=part, memory=make_plan(part).memory)

        bench = _Bench(form, wanted, plan_of_slice, admit, place, run, progress, name)
        if at is None:
            return _trial(spec, plan, wanted, whole=bench.measure(spec.num_layers))
        shallow, deep = bench.measure(at.shallow), bench.measure(at.deep)
        return _trial(
            spec,
            plan,
            wanted,
            whole=_whole(shallow, deep, at, spec),
            slices=(shallow, deep),
            scaled=_how(at, spec.num_layers),
        )


def _remove_left_behind(directory: Path) -> None:
    """Remove what processes that were killed could not."""
    for folder in directory.glob(f"{FOLDER_PREFIX}*-*"):
        pid = folder.name.removeprefix(FOLDER_PREFIX).partition("-")[0]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def _described(form: Form, place: Path, name: str) -> ModelSpec:
    """The whole model as a header alone describes it; the file is gone when this returns."""
    form.write(place, with_data=False)
    spec = form.describe(place, name)
    form.remove(place)
    return spec


def _depths(form: Form, spec: ModelSpec, wanted: Wanted) -> Depths | None:
    """Which slices to build; None for the whole model."""
    most = wanted.layers
    if most is None:
        if spec.weights_bytes <= wanted.max_bytes:
            return None
        most = _layers_within(form, wanted.max_bytes)
    elif most > spec.num_layers or most < 1:
        raise InvalidRequest(
            f"{spec.name} has {spec.num_layers} layers; choose 1 to {spec.num_layers}, not {most}"
        )
    if most == spec.num_layers:
        return None
    kinds = form.kinds(spec.kv_layers)
    found = depths(kinds, most)
    if found is None:
        least = next((n for n in range(most, spec.num_layers + 1) if depths(kinds, n)), None)
        way = f"give --layers {least} or more" if least else "it can only be measured whole"
        raise InvalidRequest(f"{most} layers of {spec.name} say nothing about the others; {way}")
    return found


def _layers_within(form: Form, max_bytes: int) -> int:
    """How many layers of average size fit beside what is no layer."""
    rest = form.weights_bytes - form.layer_bytes
    return max(1, (max_bytes - rest) * form.num_layers // form.layer_bytes)


class _Bench:
    """Builds and measures depths of one model, one file at a time."""

    def __init__(
        self,
        form: Form,
        wanted: Wanted,
        plan_of: MakePlan,
        admit: Admit,
        place: Path,
        run: Run,
        progress: Progress,
        name: str,
    ) -> None:
        self.form = form
        self.wanted = wanted
        self.plan_of = plan_of
        self.admit = admit
        self.place = place
        self.run = run
        self.progress = progress
        self.name = name

    def measure(self, depth: int) -> Measured:
        """Write the model with `depth` layers, measure it, remove it."""
        form = self.form.sliced(depth)
        place = self.place / f"{depth}-layers"
        plan = self.plan_of(_described(form, place, self.name))
        # Before it is written: what may not be loaded need not be built.
        with self.admit(plan):
            _check_room(self.place, form.file_bytes)
            self.progress(f"writing {depth} layers, {form.file_bytes / 1e9:.2f} GB")
            form.write(place)
            try:
                self.progress(f"measuring {depth} layers")
                return _measured(depth, form.weights_bytes, self.wanted, self.run_plan(plan))
            finally:
                form.remove(place)

    def run_plan(self, plan: Plan) -> Found:
        """Time what is wanted of the file that a plan loads."""
        return self.run(
            Job(
                plan=plan,
                cases=self.wanted.cases,
                repetitions=self.wanted.repetitions,
                max_fill_s=MAX_FILL_S,
            )
        )


def _check_room(place: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(place).free
    short = num_bytes + DISK_RESERVE_BYTES - free
    if short > 0:
        raise DoesNotFit(
            f"the stand-in takes {num_bytes / 1e9:.1f} GB beside {DISK_RESERVE_BYTES / 1e9:.1f} GB "
            f"that stay free, and {place.parent} has {free / 1e9:.1f} GB; "
            f"free {short / 1e9:.1f} GB, or give fewer --layers"
        )


def _measured(depth: int, weights_bytes: int, wanted: Wanted, found: Found) -> Measured:
    prefill, decode = found.rows
    memory = found.memory
    return Measured(
        num_layers=depth,
        weights_bytes=weights_bytes,
        prefill_s=_seconds(prefill, wanted.num_prompt),
        decode_s=_seconds(decode, 1),
        load_s=found.load_s,
        num_filled_tokens=found.num_filled_tokens,
        dirty_bytes=None if memory is None else memory.dirty_bytes,
        file_bytes=None if memory is None else memory.file_bytes,
        footprint=found.footprint or Footprint(weights_bytes=0, mapped_weights_bytes=0, kv_bytes=0),
    )


def _seconds(row: Row, num_tokens: int) -> Seconds:
    return Seconds(num_tokens / row.max_ts, num_tokens / row.median_ts, num_tokens / row.min_ts)


def _scaled(shallow: Seconds, deep: Seconds, at: Depths, whole: int) -> Seconds:
    """The whole's time; its range is what the slices' ranges allow at most.

    Raises:
        InvalidRequest: The deep slice takes no longer than the shallow one.
    """
    if deep.median <= shallow.median:
        raise InvalidRequest(
            f"{at.deep} layers took no longer than {at.shallow}; give more --layers, or measure "
            "while the machine does nothing else"
        )
    # No whole is quicker than its part.
    return Seconds(
        max(extrapolated(shallow.slowest, deep.quickest, at, whole), deep.quickest),
        extrapolated(shallow.median, deep.median, at, whole),
        extrapolated(shallow.quickest, deep.slowest, at, whole),
    )


def _whole(shallow: Measured, deep: Measured, at: Depths, spec: ModelSpec) -> Measured:
    """What the whole takes if its other layers are like those that were measured."""

    def bytes_of(a: int | None, b: int | None) -> int | None:
        if a is None or b is None:
            return None
        # Two slices may differ by less than a page of noise; layers never give memory back.
        return round(extrapolated(a, max(a, b), at, spec.num_layers))

    mapped = deep.footprint.mapped_weights_bytes > 0
    footprint = msgspec.structs.replace(
        deep.footprint,  # scratch is that of one layer, however many there are
        weights_bytes=spec.weights_bytes,
        mapped_weights_bytes=spec.weights_bytes if mapped else 0,
        kv_bytes=bytes_of(shallow.footprint.kv_bytes, deep.footprint.kv_bytes) or 0,
    )
    file_bytes = deep.file_bytes
    if file_bytes is not None and mapped:
        file_bytes += spec.weights_bytes - deep.weights_bytes
    return Measured(
        num_layers=spec.num_layers,
        weights_bytes=spec.weights_bytes,
        prefill_s=_scaled(shallow.prefill_s, deep.prefill_s, at, spec.num_layers),
        decode_s=_scaled(shallow.decode_s, deep.decode_s, at, spec.num_layers),
        load_s=extrapolated(shallow.load_s, deep.load_s, at, spec.num_layers),
        num_filled_tokens=min(shallow.num_filled_tokens, deep.num_filled_tokens),
        dirty_bytes=bytes_of(shallow.dirty_bytes, deep.dirty_bytes),
        file_bytes=file_bytes,
        footprint=footprint,
    )


def _how(at: Depths, whole: int) -> dict[str, str]:
    line = (
        f"straight line through {at.shallow} and {at.deep} layers, continued to {whole}: "
        "a fixed part and a part for each layer"
    )
    return dict.fromkeys(("decode", "prefill", "load", "KV", "anonymous memory"), line) | {
        "weights": "counted in the whole header, mapped pages with them",
        "compute": f"as with {at.deep} layers: it does not grow with them",
    }


def _trial(
    spec: ModelSpec,
    plan: Plan,
    wanted: Wanted,
    *,
    whole: Measured,
    slices: tuple[Measured, ...] = (),
    scaled: dict[str, str] | None = None,
) -> Trial:
    return Trial(
        spec=spec,
        plan=plan,
        whole=whole,
        slices=slices,
        scaled=scaled or {},
        num_prompt_tokens=wanted.num_prompt,
        num_generated_tokens=wanted.num_generate,
        depth_tokens=wanted.depth,
    )
