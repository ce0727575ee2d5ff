"""Keeping calibrations: what is found again, and what is never used."""

from pathlib import Path

import msgspec
import pytest
from support import calibrated

from brim.core.calibration import Calibration
from brim.core.machine import MachineSpec
from brim.errors import ConfigError, NotFound
from brim.machine import calibrations
from brim.machine.calibrations import Status, Stored

MACHINE = MachineSpec(
    name="laptop", system="linux", ram_bytes=16 * 2**30, others_bytes=0, performance_cores=2
)
MEASURED = calibrated.calibration()
LATER = MEASURED.measured_unix_s + 86_400


def find(directory: Path, machine: MachineSpec = MACHINE, now: float = LATER) -> Stored:
    return calibrations.find_calibration(
        machine, "llamacpp", version="1.2.3", directory=directory, now_unix_s=now
    )


def test_what_was_stored_is_found_again(tmp_path: Path) -> None:
    """Every sample and cost comes back as it was, and nothing else is left in the directory."""
    path = calibrations.save_calibration(MEASURED, MACHINE, tmp_path / "new")
    assert find(tmp_path / "new") == Stored(Status.GOOD, path, MEASURED, "")
    assert list(path.parent.iterdir()) == [path]


def test_storing_again_replaces_it(tmp_path: Path) -> None:
    """One file for one machine, engine and version."""
    calibrations.save_calibration(MEASURED, MACHINE, tmp_path)
    newer = msgspec.structs.replace(MEASURED, duration_s=1.0)
    calibrations.save_calibration(newer, MACHINE, tmp_path)
    assert find(tmp_path).calibration == newer


def test_a_machine_without_one_is_told_so(tmp_path: Path) -> None:
    """Nothing was measured: the status says so, and loading names the command."""
    assert find(tmp_path).status is Status.MISSING
    with pytest.raises(NotFound, match="not been calibrated; run: brim calibrate"):
        calibrations.load_calibration(MACHINE, "llamacpp", directory=tmp_path)


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"format_version": 2}', b"\xff\xfe"])
def test_a_damaged_file_is_not_used(tmp_path: Path, damage: bytes) -> None:
    """Cut short, of another shape or no text at all: damaged, with its path in the reason."""
    path = calibrations.save_calibration(MEASURED, MACHINE, tmp_path)
    path.write_bytes(damage)
    found = find(tmp_path)
    assert (found.status, found.calibration) == (Status.DAMAGED, None)
    assert str(path) in found.reason


def test_any_truncation_is_noticed(tmp_path: Path) -> None:
    """No prefix of the file passes for the whole."""
    path = calibrations.save_calibration(MEASURED, MACHINE, tmp_path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 9973):
        path.write_bytes(whole[:length])
        assert find(tmp_path).status is Status.DAMAGED


def test_a_file_of_another_format_is_stale(tmp_path: Path) -> None:
    """It is measured again and not converted."""
    path = calibrations.save_calibration(MEASURED, MACHINE, tmp_path)
    path.write_bytes(msgspec.json.encode(msgspec.to_builtins(MEASURED) | {"format_version": 99}))
    assert find(tmp_path).status is Status.STALE


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"machine": "desktop"}, "another machine"),
        ({"ram_bytes": 32 * 2**30}, "another amount of memory"),
        ({"performance_cores": 8}, "measured on 8 cores, now there are 2"),
        ({"engine_version": "1.2.4"}, "of llamacpp 1.2.4"),
        ({"costs": ()}, "not complete"),
    ],
)
def test_what_changed_since_makes_it_stale(
    tmp_path: Path, change: dict[str, object], words: str
) -> None:
    """The reason names what changed; the old figures may still be shown."""
    path = calibrations.save_calibration(MEASURED, MACHINE, tmp_path)
    other: Calibration = msgspec.structs.replace(MEASURED, **change)
    path.write_bytes(msgspec.json.encode(other))
    found = find(tmp_path)
    assert found.status is Status.STALE
    assert found.calibration == other
    assert words in found.reason


def test_half_a_year_makes_it_stale(tmp_path: Path) -> None:
    """Systems change under it."""
    calibrations.save_calibration(MEASURED, MACHINE, tmp_path)
    found = find(tmp_path, now=MEASURED.measured_unix_s + 200 * 86_400)
    assert (found.status, found.reason) == (Status.STALE, "it is 200 days old")


def test_machines_engines_and_versions_have_files_of_their_own(tmp_path: Path) -> None:
    """Also machines whose names differ in punctuation alone, or that have other cores."""
    replace = msgspec.structs.replace
    machines = [MACHINE, replace(MACHINE, name="lap-top"), replace(MACHINE, performance_cores=4)]
    machines.append(replace(MACHINE, name="lap top"))
    paths = {
        calibrations.calibration_path(machine, engine, version, tmp_path)
        for machine in machines
        for engine in ("llamacpp", "mlx")
        for version in ("1.2.3", "1.2.4")
    }
    assert len(paths) == 16


def test_an_engine_without_costs_cannot_be_calibrated() -> None:
    """The toy engine computes nothing worth a forecast."""
    with pytest.raises(ConfigError, match="choose one of llamacpp"):
        calibrations.engine_version("toy")


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """The sentence says which one, and how to choose another."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="XDG_STATE_HOME"):
        calibrations.save_calibration(MEASURED, MACHINE, tmp_path / "file")
