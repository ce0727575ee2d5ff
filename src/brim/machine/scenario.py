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
"""

import difflib
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any

import msgspec

from brim.core.machine import MachineSpec, Pressure, ThermalState
from brim.errors import ConfigError
from brim.machine import chips

Bytes = Annotated[int, msgspec.Meta(ge=0)]
Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]
Percent = Annotated[int, msgspec.Meta(ge=0, le=100)]
NotNegative = Annotated[float, msgspec.Meta(ge=0)]


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
    thermal: ThermalState | None = None
    hottest_celsius: float | None = None
    is_throttled: bool | None = None
    is_low_power: bool | None = None
    is_on_battery: bool | None = None
    battery_percent: Percent | None = None
    busy_fraction: Fraction | None = None


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    machine: str
    ram_gb: Annotated[float, msgspec.Meta(ge=1, le=4096)] | None = None
    step: Annotated[tuple[Step, ...], msgspec.Meta(min_length=1)]


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """A machine and what happens to it."""

    where: str
    """The file, for messages and sources."""
    machine: MachineSpec
    """Idle, before anything happens."""
    steps: tuple[Step, ...]
    """In the order of time."""

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
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        reason = getattr(exc, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"the scenario {path} cannot be read: {reason}") from exc
    return parse_scenario(text, where=str(path))


def parse_scenario(text: str, *, where: str) -> Scenario:
    """The scenario that `text` describes.

    Raises:
        ConfigError: A key or value is wrong; the message names it.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"{where} is not TOML: {exc}") from exc
    _check_keys(document, where)
    try:
        file = msgspec.convert(document, _File)
    except msgspec.ValidationError as exc:
        raise ConfigError(f"{where}: {_in_words(str(exc))}") from exc
    machine = _machine(file, where)
    _check_steps(file.step, machine, where)
    return Scenario(where=where, machine=machine, steps=file.step)


def _machine(file: _File, where: str) -> MachineSpec:
    try:
        if file.ram_gb is None:
            return chips.named_machine(file.machine)
        return chips.machine_with_ram(file.machine, file.ram_gb)
    except ConfigError as exc:
        raise ConfigError(f"{where}: machine: {exc.message}", param="machine") from exc


def _check_keys(document: dict[str, Any], where: str) -> None:
    """Refuse keys that do not exist, with the nearest that does."""
    _check_names(document, _File, f"{where}:")
    for i, step in enumerate(_tables(document.get("step")), start=1):
        _check_names(step, Step, f"{where}: step {i}:")
        for process in _tables(step.get("process")):
            _check_names(process, ScenarioProcess, f"{where}: step {i}, process:")


def _tables(value: Any) -> list[dict[str, Any]]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _check_names(table: dict[str, Any], kind: type[msgspec.Struct], where: str) -> None:
    for key in table:
        if key not in kind.__struct_fields__:
            near = difflib.get_close_matches(key, kind.__struct_fields__, n=1)
            hint = (
                f"did you mean '{near[0]}'?"
                if near
                else (f"there are {', '.join(kind.__struct_fields__)}")
            )
            raise ConfigError(f"{where} there is no key '{key}'; {hint}")


def _check_steps(steps: tuple[Step, ...], machine: MachineSpec, where: str) -> None:
    """Refuse steps out of order, and more memory in use than there is."""
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
            process_bytes = sum(process.dirty_bytes for process in step.process)
        if others_bytes + process_bytes > machine.ram_bytes:
            raise ConfigError(
                f"{where}: step {i}: others_bytes and its processes' dirty_bytes are "
                f"{others_bytes + process_bytes}, more than the {machine.ram_bytes} of memory"
            )


def _in_words(message: str) -> str:
    """A validation error with its key in front, and for a word the words that would do."""
    what, _, path = message.partition(" - at `$")
    key = re.sub(r"\[(\d+)\]", lambda n: f" {int(n[1]) + 1}", path.rstrip("`").lstrip("."))
    what = what[0].lower() + what[1:]
    for name, words in (("pressure", Pressure), ("thermal", ThermalState)):
        if path.endswith(f".{name}`"):
            what += f"; write {', '.join(word.value for word in words)}"
    return f"{key}: {what}" if key else what
