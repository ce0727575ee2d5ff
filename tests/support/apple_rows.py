"""A random sample of published measurements, with their sources, and the chips they ran on."""

from pathlib import Path

from brim.core.machine import MachineSpec
from brim.machine.chips import find_chip, machine_of
from brim.planner.rows import GIB, Row, decode_rows

SAMPLE = Path(__file__).parent.parent / "unit/planner/apple_rows.json"
"""36 decode and 24 prefill rows, drawn at random from those that the constants were fitted to."""


def sample_rows() -> list[Row]:
    return decode_rows(SAMPLE.read_bytes())


def chip_of(row: Row) -> MachineSpec | None:
    cores, ram_gb = row.gpu_cores, row.ram_gb or 16
    chip = find_chip(row.chip, int(cores) if cores else None, int(ram_gb * GIB))
    return None if chip is None else machine_of(chip, ram_gb)
