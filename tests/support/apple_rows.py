"""A random sample of published measurements, with their sources."""

from pathlib import Path

from brim.planner.apple.rows import Row, decode_rows

SAMPLE = Path(__file__).parent.parent / "unit/planner/apple_rows.json"
"""36 decode and 24 prefill rows, drawn at random from those that the constants were fitted to."""


def sample_rows() -> list[Row]:
    return decode_rows(SAMPLE.read_bytes())
