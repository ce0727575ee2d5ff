"""How much of a machine may be used."""

import msgspec
import pytest

from brim.core.machine import MachineSpec
from brim.ledger.budget import budget_of

GB = 10**9


@pytest.mark.parametrize(
    ("ram", "others", "gpu", "comfortable", "tight"),
    [
        (16, 3, None, (11_200_000_000, "0.70 x ram"), (12 * GB, "ram minus others and reserve")),
        (16, 9, None, (6 * GB, "ram minus others and reserve"), (6 * GB, "ram minus")),
        (16, 3, 10, (10 * GB, "gpu limit"), (10 * GB, "gpu limit")),
        (100, 5, 84, (70 * GB, "0.70 x ram"), (84 * GB, "gpu limit")),
        (100, 5, None, (70 * GB, "0.70 x ram"), (90 * GB, "ram minus others and reserve")),
        (8, 9, None, (0, "ram minus others and reserve"), (0, "ram minus others and reserve")),
    ],
)
def test_budget_is_the_smallest_limit(
    ram: int, others: int, gpu: int | None, comfortable: tuple[int, str], tight: tuple[int, str]
) -> None:
    """Comfortable and tight are the smallest of their limits, by name, and never negative."""
    machine = MachineSpec(
        name="m", system="linux", ram_bytes=ram * GB, others_bytes=others * GB,
        gpu_limit_bytes=None if gpu is None else gpu * GB,
    )  # fmt: skip
    budget = budget_of(machine)
    for limit, (num_bytes, binding) in ((budget.comfortable, comfortable), (budget.tight, tight)):
        assert limit.num_bytes == num_bytes
        assert limit.binding.startswith(binding)


def test_reserve_is_a_gigabyte_or_a_twentieth(machine: MachineSpec) -> None:
    """The reserve is 1 GB up to 20 GB of RAM, and 5 % above."""
    assert budget_of(machine).reserve_bytes == 1 * GB
    large = msgspec.structs.replace(machine, ram_bytes=200 * GB)
    assert budget_of(large).reserve_bytes == 10 * GB
