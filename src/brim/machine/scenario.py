"""Scenario files: what a simulated machine goes through, as TOML.

    machine = "MacBook Air M4:10:16"    # any chip of the table
    ram_gb = 20                         # only for a size that is not sold

    [[step]]
    at_s = 0
    others_bytes = 3_500_000_000        # the system and everything without a [[step.process]]
    pressure = "normal"

    [[step]]
    at_s = 30
    pressure = "warning"
    [[step.process]]
    name = "browser"
    pid = 501
    dirty_bytes = 6_000_000_000
    resident_bytes = 6_500_000_000

A value holds until a later step gives another; `process` stands for the whole list.

A scenario may also say what is asked of which models meanwhile.  Where a server runs it, the models
are the ones that it serves under these names; the figures describe them where nobody loads any.

    [[model]]
    name = "chat"
    weights_bytes = 4_900_000_000
    kv_tokens = 16384
    kv_token_bytes = 69632

    [[request]]
    at_s = 5
    model = "chat"
    prompt_tokens = 800
    answer_tokens = 200
    every_s = 20                        # and again until it ends
    until_s = 100
"""

from pathlib import Path
from typing import Annotated, Any

import msgspec

from brim.config import toml_file
from brim.core.machine import MachineSpec, Pressure, ThermalState
from brim.core.request import Priority
from brim.errors import ConfigError
from brim.machine import chips

Bytes = Annotated[int, msgspec.Meta(ge=0)]
Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]
Percent = Annotated[int, msgspec.Meta(ge=0, le=100)]
NotNegative = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
"""Seconds and ratios; TOML has a number `inf`, which no clock reaches."""
Celsius = Annotated[float, msgspec.Meta(ge=-273.15, le=1000)]
Positive = Annotated[int, msgspec.Meta(ge=1)]
Rate = Annotated[float, msgspec.Meta(gt=0)]

MAX_REPEATS = 10_000
"""Of one request: a mistyped period must not fill the memory."""


class ScenarioProcess(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One process that the scenario gives memory to."""

    name: str
    pid: Annotated[int, msgspec.Meta(ge=1)]
    dirty_bytes: Bytes
    resident_bytes: Bytes
    file_bytes: Bytes = 0


class Step(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What changes at one moment; None leaves a value as it was."""

    at_s: NotNegative
    others_bytes: Bytes | None = None
    process: tuple[ScenarioProcess, ...] | None = None
    pressure: Pressure | None = None
    compressor_ratio: NotNegative | None = None
    stalled_percent: Annotated[float, msgspec.Meta(ge=0, le=100)] | None = None
    available_bytes: Bytes | None = None
    swap_used_bytes: Bytes | None = None
    swapped_out_bytes: Bytes | None = None
    swapped_in_bytes: Bytes | None = None
    refaulted_bytes: Bytes | None = None
    major_faults: Annotated[int, msgspec.Meta(ge=0)] | None = None
    thermal: ThermalState | None = None
    hottest_celsius: Celsius | None = None
    is_throttled: bool | None = None
    is_low_power: bool | None = None
    is_on_battery: bool | None = None
    battery_percent: Percent | None = None
    busy_fraction: Fraction | None = None


class ScenarioModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model that is asked, and what it is like where it is described and not loaded."""

    name: Annotated[str, msgspec.Meta(min_length=1)]
    weights_bytes: Bytes
    kv_tokens: Positive
    kv_token_bytes: Positive
    overhead_bytes: Bytes = 300_000_000
    """Of the process: Python, the backend and its scratch memory."""
    load_s: NotNegative = 3.0
    prefill_tok_s: Rate = 500.0
    decode_tok_s: Rate = 25.0
    is_pinned: bool = False
    idle_unload_s: NotNegative | None = None
    """In place of the setting; 0 keeps it."""
    is_loaded: bool = True
    """Whether it is in memory when the scenario begins."""


class ScenarioRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request, or one after the other."""

    at_s: NotNegative
    model: str
    prompt_tokens: Positive
    answer_tokens: Positive
    every_s: Annotated[float, msgspec.Meta(gt=0)] | None = None
    until_s: NotNegative | None = None
    priority: Priority = Priority.INTERACTIVE
    app: str = ""
    """Who asks, for those who read the file."""


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    machine: str
    ram_gb: Annotated[float, msgspec.Meta(ge=1, le=4096)] | None = None
    step: Annotated[tuple[Step, ...], msgspec.Meta(min_length=1)]
    model: tuple[ScenarioModel, ...] = ()
    request: tuple[ScenarioRequest, ...] = ()
    end_s: NotNegative | None = None


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """A machine and what happens to it."""

    where: str
    """The file, for messages and sources."""
    machine: MachineSpec
    """Idle, before anything happens."""
    steps: tuple[Step, ...]
    """In the order of time."""
    models: tuple[ScenarioModel, ...] = ()
    requests: tuple[ScenarioRequest, ...] = ()
    """Each of them once, in the order of time."""
    end_s: float = 0.0
    """When it is over; what holds then holds for good."""

    def value_at(self, field: str, seconds: float) -> tuple[Any, float] | None:
        """A field's value at a moment, and when it was given; None where no step gave it yet."""
        for step in reversed(self.steps):
            value = getattr(step, field)
            if step.at_s <= seconds and value is not None:
                return value, step.at_s
        return None


def load_scenario(path: Path) -> Scenario:
    """The scenario in a file.

    Raises:
        ConfigError: The file cannot be read, or a key or value of it is wrong.
    """
    return parse_scenario(toml_file.read_text(path, what="the scenario"), where=str(path))


def parse_scenario(text: str, *, where: str) -> Scenario:
    """The scenario that `text` describes.

    Raises:
        ConfigError: A key or value is wrong; the message names it.
    """
    document = toml_file.parse_document(text, where=where)
    toml_file.check_keys(document, _File, where=where)
    file = toml_file.convert(document, _File, where=where)
    machine = _machine(file, where)
    _check_steps(file.step, machine, where)
    requests = _requests(file, where)
    times = [file.step[-1].at_s, *(request.at_s for request in requests)]
    return Scenario(
        where=where,
        machine=machine,
        steps=file.step,
        models=file.model,
        requests=requests,
        end_s=max(times) if file.end_s is None else file.end_s,
    )


def _machine(file: _File, where: str) -> MachineSpec:
    try:
        if file.ram_gb is None:
            return chips.named_machine(file.machine)
        return chips.machine_with_ram(file.machine, file.ram_gb)
    except ConfigError as exc:
        raise ConfigError(f"{where}: machine: {exc.message}", param="machine") from exc


def _requests(file: _File, where: str) -> tuple[ScenarioRequest, ...]:
    """Every request by itself, in the order of time.

    Raises:
        ConfigError: One is for a model that the file does not describe, or its repeats have no end.
    """
    names = {model.name for model in file.model}
    if len(names) < len(file.model):
        raise ConfigError(f"{where}: two models have one name; rename one")
    found = []
    for i, request in enumerate(file.request, start=1):
        if request.model not in names:
            raise ConfigError(f"{where}: request {i}: there is no [[model]] '{request.model}'")
        if (request.every_s is None) != (request.until_s is None):
            raise ConfigError(f"{where}: request {i}: give every_s and until_s, or neither")
        found.append(request)
        if request.every_s is not None and request.until_s is not None:
            num = (request.until_s - request.at_s) / request.every_s
            if not 0 <= num <= MAX_REPEATS:
                raise ConfigError(
                    f"{where}: request {i}: until_s must be at or after at_s, and leave room for "
                    f"at most {MAX_REPEATS} repeats"
                )
            found += [
                msgspec.structs.replace(request, at_s=request.at_s + n * request.every_s)
                for n in range(1, int(num) + 1)
            ]
    return tuple(sorted(found, key=lambda request: request.at_s))


def _check_steps(steps: tuple[Step, ...], machine: MachineSpec, where: str) -> None:
    """Refuse steps out of order, a pid that is there twice, and more memory than there is."""
    others_bytes, process_bytes, before_s = machine.others_bytes, 0, -1.0
    for i, step in enumerate(steps, start=1):
        if step.at_s <= before_s:
            raise ConfigError(
                f"{where}: step {i}: at_s is {step.at_s:g}, which is not after the step before"
            )
        before_s = step.at_s
        if step.others_bytes is not None:
            others_bytes = step.others_bytes
        if step.process is not None:
            if len({process.pid for process in step.process}) < len(step.process):
                raise ConfigError(f"{where}: step {i}: two processes have one pid; change one")
            process_bytes = sum(process.dirty_bytes for process in step.process)
        if others_bytes + process_bytes > machine.ram_bytes:
            raise ConfigError(
                f"{where}: step {i}: others_bytes and its processes' dirty_bytes are "
                f"{others_bytes + process_bytes}, more than the {machine.ram_bytes} of memory"
            )
