"""`brim calibrate`: measures this machine, for forecasts that are its own."""

import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from brim.core.calibration import Calibration, LoadSetting, OptionRate
    from brim.machine.calibrations import Stored

LINE_EVERY_S = 10.0
"""Between lines of progress where stderr is no terminal: a log, in which each stays."""


def calibrate(
    engine: Annotated[str, typer.Option(help="The engine to measure.")] = "llamacpp",
    anyway: Annotated[
        bool,
        typer.Option("--anyway", help="Measure even a busy, hot, throttled or swapping machine."),
    ] = False,
    show: Annotated[
        bool, typer.Option("--show", help="Show what was measured before; measure nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure this machine in about a minute: bandwidth, decode, prefill, KV types, loading."""
    from brim.cli.errors import say
    from brim.cli.output import print_json
    from brim.machine.calibrations import find_calibration
    from brim.machine.reading import read_machine

    if show:
        stored = find_calibration(read_machine(), engine)
    else:
        stored = _measure(engine, anyway=anyway)
    if as_json:
        print_json(
            {
                "status": stored.status,
                "reason": stored.reason,
                "path": str(stored.path),
                "calibration": _without_samples(stored.calibration),
            }
        )
    elif stored.calibration is not None:
        _print(stored.calibration)
    if stored.reason:
        say(f"{stored.reason}; run: brim calibrate")
        raise typer.Exit(1)


def _measure(engine: str, *, anyway: bool) -> "Stored":
    """Check the machine, measure it, and store what came of it."""
    import tempfile

    import msgspec

    from brim.bench.calibrate.readiness import objections
    from brim.bench.calibrate.run import Subject
    from brim.bench.calibrate.run import calibrate as run
    from brim.bench.calibrate.standins import memory_needed
    from brim.cli.errors import say
    from brim.cli.neighbours import granted
    from brim.errors import Busy, Unsupported
    from brim.machine.bandwidth import read_bandwidth, thread_counts
    from brim.machine.calibrations import Status, Stored, engine_version, save_calibration
    from brim.machine.reading import read_conditions, read_machine

    if engine == "mlx":
        raise Unsupported(
            "brim calibrate measures llama.cpp alone; MLX is forecast from measured Macs, and not "
            "at all on a processor: leave --engine out"
        )
    version, machine, first = engine_version(engine), read_machine(), read_conditions()
    conditions = read_conditions()
    found = objections(first, conditions)
    if found and not anyway:
        raise Busy(
            f"measuring now would mislead every forecast: {'; '.join(found)}; wait or close what "
            "causes it, or measure all the same with --anyway"
        )
    subject = Subject(
        machine=machine,
        engine=engine,
        engine_version=version,
        conditions=conditions,
        warnings=found,
    )
    reporter = Progress(is_terminal=sys.stderr.isatty())
    with (
        granted("calibration", memory_needed()),
        tempfile.TemporaryDirectory(prefix="calibrate-", dir=_scratch_directory()) as scratch,
    ):
        from pathlib import Path

        bandwidth = read_bandwidth(thread_counts(machine.performance_cores))
        calibration = run(subject, Path(scratch), bandwidth=bandwidth, progress=reporter.show)
    reporter.end()
    for objection in objections(conditions, read_conditions()):
        if objection not in found:
            say(f"while it was measured, {objection}; if forecasts disappoint, calibrate again")
            calibration = msgspec.structs.replace(
                calibration, warnings=(*calibration.warnings, objection)
            )
    path = save_calibration(calibration, machine)
    return Stored(Status.GOOD, path, calibration, "")


def _scratch_directory() -> str:
    """On the disk where downloads are kept too, whose read rate is wanted."""
    import platformdirs

    path = platformdirs.user_cache_path("brim", appauthor=False)
    path.mkdir(parents=True, exist_ok=True)
    return str(path)


class Progress:
    """One line on stderr that is written over, or a line now and then where it would stay."""

    def __init__(self, *, is_terminal: bool) -> None:
        self._is_terminal = is_terminal
        self._start_s = time.monotonic()
        self._last_s = float("-inf")
        self._width = 0

    def show(self, share: float, what: str) -> None:
        """Say what comes next and how long all of it will take."""
        now_s = time.monotonic()
        elapsed_s = now_s - self._start_s
        left = f", about {elapsed_s * (1 - share) / share:.0f} s left" if share > 0.02 else ""
        text = f"brim: {share:4.0%}{left}: {what}"
        if self._is_terminal:
            sys.stderr.write("\r" + text.ljust(self._width))
            sys.stderr.flush()
            self._width = len(text)
        elif now_s - self._last_s >= LINE_EVERY_S:
            sys.stderr.write(text + "\n")
            self._last_s = now_s

    def end(self) -> None:
        """Leave the line."""
        if self._is_terminal:
            sys.stderr.write("\r" + " " * self._width + "\r")


def _without_samples(calibration: "Calibration | None") -> "Calibration | None":
    """What programs want of it: the file has every sample as well."""
    import msgspec

    if calibration is None:
        return None
    return msgspec.structs.replace(calibration, samples=(), load_samples=())


def _print(calibration: "Calibration") -> None:
    from brim.cli.output import print_table
    from brim.planner.calibrated_speed import describe_source

    typer.echo(f"{calibration.machine}: {describe_source(calibration)}")
    for warning in calibration.warnings:
        typer.echo(f"measured although {warning}")
    rows = [
        (f"memory, {sample.num_threads} threads", f"{sample.bytes_per_s / 1e9:.1f} GB/s")
        for sample in calibration.bandwidth
    ]
    disk = calibration.load.disk_bytes_per_s
    rows.append(("disk", "-" if disk is None else f"{disk / 1e9:.2f} GB/s"))
    print_table(("read", "rate"), rows, right=frozenset({1}))
    typer.echo("")
    head = ("stand-in", "options", "depth", "decode tok/s", "prompt", "prefill tok/s")
    print_table(head, list(_rate_rows(calibration)), right=frozenset({2, 3, 4, 5}))


def _rate_rows(calibration: "Calibration") -> Iterator[tuple[str, ...]]:
    """A row for each combination, in the order of measuring."""
    for rate in calibration.options:
        yield (
            rate.model,
            _words(rate.setting),
            str(rate.depth),
            _rate(rate, "decode_tok_s"),
            str(rate.num_prompt or "-"),
            _rate(rate, "prefill_tok_s"),
        )


def _rate(rate: "OptionRate", field: str) -> str:
    value = getattr(rate, field)
    return "-" if value is None else f"{value:.1f}"


def _words(setting: "LoadSetting") -> str:
    """A setting in a column."""
    words = [f"{setting.num_threads}/{setting.num_batch_threads} threads", setting.wait_policy]
    words.append(f"KV {setting.kv_type_k}/{setting.kv_type_v}")
    words += [
        name
        for name, is_on in (
            ("flash", setting.flash_attention),
            ("repacked", setting.repack_weights),
        )
        if is_on
    ]
    if setting.micro_batch_tokens != 512:
        words.append(f"micro-batch {setting.micro_batch_tokens}")
    return ", ".join(words)
