"""Keeps calibrations: one JSON file for each machine, engine and engine version.

They lie in the user's state directory, because measuring again brings them back.  A file that is
damaged, of another format or of another machine is never used; whoever asks is told which it is.
"""

import hashlib
import importlib.metadata
import os
import re
import tempfile
import time
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

import msgspec

from brim.core.calibration import FORMAT_VERSION, Calibration
from brim.core.machine import MachineSpec
from brim.errors import ConfigError, NotFound

ENGINE_PACKAGES = {"llamacpp": "llama-cpp-python", "mlx": "mlx"}
"""Whose version decides how fast an engine is."""

MAX_AGE_S = 180 * 86_400.0
"""Half a year: systems and firmware change under a calibration, slowly."""

RAM_TOLERANCE = 0.02
"""A kernel update moves what it keeps for itself by less than that."""


class Status(StrEnum):
    """What stands in the place of a calibration."""

    GOOD = "good"
    MISSING = "missing"
    STALE = "stale"
    """It was measured, but of something that has changed since."""
    DAMAGED = "damaged"


class Stored(NamedTuple):
    """What was found, and what to say of it."""

    status: Status
    path: Path
    calibration: Calibration | None
    """Also of a stale file."""
    reason: str
    """Why it is not good; empty where it is."""


def engine_version(engine: str) -> str:
    """The installed version of an engine's backend.

    Raises:
        ConfigError: It is not installed, or the engine has none.
    """
    package = ENGINE_PACKAGES.get(engine)
    if package is None:
        raise ConfigError(
            f"the {engine} engine cannot be calibrated; choose one of {', '.join(ENGINE_PACKAGES)}"
        )
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as exc:
        raise ConfigError(
            f"the {engine} engine is missing; install it with: pip install {package}"
        ) from exc


def calibrations_directory() -> Path:
    """Where the files lie; made by `save_calibration`."""
    import platformdirs

    return platformdirs.user_state_path("brim", appauthor=False) / "calibrations"


def calibration_path(
    machine: MachineSpec, engine: str, version: str, directory: Path | None = None
) -> Path:
    """The file of one machine, engine and version.

    The name is for people; the hash keeps apart machines whose names differ in punctuation alone,
    or in cores.
    """
    identity = f"{machine.system} {machine.name} {machine.performance_cores}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
    plain = re.sub(r"[^a-z0-9]+", "-", machine.name.lower()).strip("-")[:40]
    plain_version = re.sub(r"[^A-Za-z0-9.]+", "-", version)
    name = f"{plain}-{digest}-{engine}-{plain_version}.json"
    return (directory or calibrations_directory()) / name


def save_calibration(
    calibration: Calibration, machine: MachineSpec, directory: Path | None = None
) -> Path:
    """Store it in place of an earlier one; a reader never sees half a file.

    Raises:
        ConfigError: The directory cannot be written.
    """
    path = calibration_path(machine, calibration.engine, calibration.engine_version, directory)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".new-", delete=False) as file:
            scratch = Path(file.name)
            file.write(msgspec.json.encode(calibration))
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except OSError as exc:
        raise ConfigError(
            f"{path.parent} cannot be written ({exc.strerror}); set XDG_STATE_HOME to a directory "
            "of yours"
        ) from exc
    return path


def find_calibration(
    machine: MachineSpec,
    engine: str,
    *,
    version: str | None = None,
    directory: Path | None = None,
    now_unix_s: float | None = None,
) -> Stored:
    """What is stored for this machine and engine, and whether it may be used.

    Args:
        machine: The machine at hand.
        engine: The engine.
        version: Of its backend; the installed one unless given.
        directory: Where files lie, unless it is the usual place.
        now_unix_s: The time; now unless given.

    Raises:
        ConfigError: The engine's backend is not installed.
    """
    version = version or engine_version(engine)
    path = calibration_path(machine, engine, version, directory)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return Stored(Status.MISSING, path, None, "this machine has not been calibrated")
    except OSError as exc:
        return Stored(Status.DAMAGED, path, None, f"{path} cannot be read ({exc.strerror})")
    try:
        if _format_of(data) != FORMAT_VERSION:
            return Stored(Status.STALE, path, None, "it was stored by another version of brim")
        calibration = msgspec.json.decode(data, type=Calibration)
    except msgspec.MsgspecError as exc:
        return Stored(Status.DAMAGED, path, None, f"{path} is damaged ({exc})")
    now = time.time() if now_unix_s is None else now_unix_s
    reason = stale_reason(calibration, machine, engine, version, now)
    return Stored(Status.STALE if reason else Status.GOOD, path, calibration, reason)


def load_calibration(
    machine: MachineSpec, engine: str, *, directory: Path | None = None
) -> Calibration:
    """The calibration of this machine and engine.

    Raises:
        NotFound: There is none that may be used; says why and what to run.
        ConfigError: The engine's backend is not installed.
    """
    stored = find_calibration(machine, engine, directory=directory)
    if stored.calibration is None or stored.status is not Status.GOOD:
        raise NotFound(f"no calibration to use: {stored.reason}; run: brim calibrate")
    return stored.calibration


def stale_reason(
    calibration: Calibration, machine: MachineSpec, engine: str, version: str, now_unix_s: float
) -> str:
    """What has changed since it was measured; empty where nothing has."""
    if (calibration.engine, calibration.engine_version) != (engine, version):
        return f"it is of {calibration.engine} {calibration.engine_version}"
    if calibration.machine != machine.name:
        return f"it is of another machine ({calibration.machine})"
    if calibration.performance_cores != machine.performance_cores:
        return (
            f"it was measured on {calibration.performance_cores} cores, now there are "
            f"{machine.performance_cores}"
        )
    if abs(calibration.ram_bytes / machine.ram_bytes - 1) > RAM_TOLERANCE:
        return "it was measured with another amount of memory"
    if not calibration.costs or not calibration.bandwidth:
        return "it is not complete"
    age_s = now_unix_s - calibration.measured_unix_s
    if age_s > MAX_AGE_S:
        return f"it is {age_s / 86_400:.0f} days old"
    return ""


class _Format(msgspec.Struct):
    format_version: int = 0


def _format_of(data: bytes) -> int:
    return msgspec.json.decode(data, type=_Format).format_version
