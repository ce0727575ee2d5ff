"""Names of machines: whatever is written is a machine or a sentence on what to write."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brim.core.machine import MachineSpec
from brim.errors import ConfigError
from brim.machine.chips import Chip, chips, named_machine
from brim.machine.names import MachineName, parse_machine_name

CHIPS = sorted({chip.chip for chip in chips()})
WORDS = [*CHIPS, "MacBook Air", "studio", "GB", "core", "gpu", ":", "-", "/", "²", "٣", "0", "16"]


@settings(max_examples=30, deadline=None)
@given(
    st.text(max_size=30)
    | st.lists(st.sampled_from(WORDS) | st.integers(0, 10**6).map(str), max_size=6).map(" ".join)
)
def test_any_text_is_a_machine_or_an_error_in_words(text: str) -> None:
    """Nothing that can be typed ends in anything but a machine or a ConfigError."""
    try:
        assert isinstance(named_machine(text), MachineSpec)
    except ConfigError as error:
        assert "\n" not in error.message or "\n" in text


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(chips()), st.data())
def test_units_may_stand_in_any_order(chip: Chip, data: st.DataObject) -> None:
    """With units, cores, memory and chip may come in any order and with any separator."""
    ram_gb = data.draw(st.sampled_from(chip.ram_gb))
    parts = data.draw(st.permutations([chip.chip, f"{chip.gpu_cores}-core", f"{ram_gb}GB"]))
    text = data.draw(st.sampled_from([" ", ", ", " / ", "-"])).join(parts)
    spec = named_machine(text)
    assert (spec.chip, spec.gpu_cores) == (chip.chip, chip.gpu_cores)
    assert spec.ram_bytes == ram_gb * 2**30


@pytest.mark.parametrize(
    ("name", "readings"),
    [
        (MachineName(text="", chip="M4"), [(None, None)]),
        (MachineName(text="", chip="M4", numbers=(10, 16)), [(10, 16), (16, 10)]),
        (MachineName(text="", chip="M4", numbers=(16,)), [(None, 16), (16, None)]),
        (
            MachineName(text="", chip="M4", numbers=(10,), is_positional=True),
            [(10, None), (None, 10)],
        ),
        (MachineName(text="", chip="M4", gpu_cores=10, numbers=(16,)), [(10, 16)]),
        (MachineName(text="", chip="M4", ram_gb=16, numbers=(10,)), [(10, 16)]),
    ],
)
def test_numbers_without_a_unit_are_tried_both_ways(
    name: MachineName, readings: list[tuple[int | None, int | None]]
) -> None:
    """A bare number is memory first, after a colon GPU cores first; two are cores and memory."""
    assert list(name.readings()) == readings


def test_a_name_of_any_length_is_answered() -> None:
    """A name too long to be one is refused before its numbers are read."""
    with pytest.raises(ConfigError, match="at most 100 characters"):
        parse_machine_name("M4 " + "9" * 5000, CHIPS)
