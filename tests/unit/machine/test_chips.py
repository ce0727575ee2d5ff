"""The chip table, and the machines that are described from it."""

import itertools
import json
from pathlib import Path

import msgspec
import pytest

from brim.core.machine import Cooling
from brim.errors import ConfigError
from brim.machine.chips import (
    chips,
    find_chip,
    known_machines,
    machine_with_ram,
    named_machine,
    working_set_fraction,
)

FIXTURES = Path(__file__).parent / "fixtures"
GIB = 1024**3


@pytest.mark.parametrize(
    "text",
    [
        "M4 Max:40:128", "m4-max-40-128", "M4 Max 128GB", "Apple M4 Max, 40-core GPU, 128 GB",
        "M4 Max:40c:128g", "m4max 128 gib", "M4 Max 128 40", "M4 Max::128", "M4 Max (40/128)",
        "16-inch M4 Max, 128GB",
    ],
)  # fmt: skip
def test_writings_of_one_machine(text: str) -> None:
    """However it is written, it is the same machine with the same figures."""
    spec = named_machine(text)
    assert spec.name == "M4 Max:40:128"
    assert (spec.chip, spec.gpu_cores, spec.ram_bytes) == ("M4 Max", 40, 128 * GIB)
    assert (spec.memory_bandwidth, spec.fp32_flops) == (546 * 10**9, 18_400_000_000_000)
    assert spec.performance_cores == 12
    assert (spec.system, spec.is_at_hand, spec.is_simulated) == ("darwin", False, False)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("m4-16", "M4:8:16"),
        ("M4", "M4:8:16"),
        ("M4:10", "M4:10:16"),
        ("M3 Ultra:80:512", "M3 Ultra:80:512"),
        ("M4 Max", "M4 Max:32:36"),
        ("M1 Pro:16", "M1 Pro:16:16"),
        ("m1-8", "M1:7:8"),
        ("M2 Max 96", "M2 Max:30:96"),
        ("a18 pro", "A18 Pro:5:8"),
        ("M6-24", "M6:12:24"),
    ],
)
def test_what_is_left_out_is_the_lower_bin_and_the_smaller_size(text: str, name: str) -> None:
    """Without GPU cores the lower bin sold with the memory is meant, without memory the least."""
    assert named_machine(text).name == name


def test_what_was_assumed_is_said() -> None:
    """Bin, memory, cooling and what others use are marked as assumed, and only where they are."""
    spec = named_machine("M4")
    for name in ("gpu_cores", "ram_bytes", "cooling", "others_bytes"):
        assert spec.sources[name].startswith("assumed"), name
    full = named_machine("Mac mini M4:10:16")
    assert full.name == "Mac mini M4:10:16"
    for name in ("gpu_cores", "ram_bytes", "cooling"):
        assert not full.sources[name].startswith("assumed"), name


@pytest.mark.parametrize(
    ("text", "cooling"),
    [
        ("MacBook Air M4 16GB", Cooling.FANLESS),
        ("M4 MacBook Pro 16", Cooling.COMPACT),
        ("Mac Studio M4 Max", Cooling.DESKTOP),
        ("M4", Cooling.FANLESS),
        ("M4 Pro", Cooling.COMPACT),
        ("M2 Ultra", Cooling.DESKTOP),
        ("M6", None),
    ],
)
def test_cooling_is_by_product_or_the_weakest(text: str, cooling: Cooling | None) -> None:
    """A product says its cooling; a chip alone has the weakest that it is sold with."""
    assert named_machine(text).cooling is cooling


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "M4 Ultra",
            "no M4 Ultra in the table; name one that is: the nearest are M3 Ultra, M4 Max",
        ),
        ("M9 Max", "the nearest are .*M5 Max"),
        ("Ryzen", "names no chip; write one as in '.*known are A18 Pro, M1,"),
        ("", "names no chip"),
        ("M4 Max:40:97", "48, 64, 128 GB: write 'M4 Max:40:128'"),
        ("M4:9:16", "8 GPU cores with 16, 24, 32 GB; 10 GPU cores"),
        ("M4 9 GB", "no M4 is sold as 'M4 9 GB'"),
        ("M4 Max 40 128 3", "too many numbers; .*M4 Max:40:128.*, or only"),
        ("M4 turbo", "'turbo' is not understood"),
        ("M4 16GB 24GB", "'24gb' is not understood"),
    ],
)
def test_machines_that_do_not_exist_are_refused(text: str, words: str) -> None:
    """An unknown chip, bin or size is one sentence with what there is instead."""
    with pytest.raises(ConfigError, match=words):
        named_machine(text)


def test_a_size_of_another_chip_is_planned_for() -> None:
    """A memory size that Apple sells, but not with this chip, is answered and said to be unsold."""
    machine = named_machine("M4 Max:40:36")
    assert (machine.ram_bytes, machine.gpu_cores) == (36 * 2**30, 40)
    assert machine.sources["ram_bytes"] == "named, though no M4 Max:40:36 is sold"
    assert machine.gpu_limit_bytes == named_machine("M4 Max:32:36").gpu_limit_bytes


def test_every_known_machine_can_be_named() -> None:
    """The name of each configuration sold is read back as that machine, and none comes twice."""
    machines = list(known_machines())
    names = [machine.name for machine in machines]
    assert len(set(names)) == len(names) > 80
    for machine in machines:
        assert msgspec.structs.replace(named_machine(machine.name)) == machine


def test_known_machines_make_sense() -> None:
    """Each has bandwidth, a GPU limit below its RAM, and room beside what others use."""
    for machine in known_machines():
        assert machine.memory_bandwidth is not None
        assert machine.memory_bandwidth >= 60 * 10**9
        assert machine.gpu_limit_bytes is not None
        assert 0.6 < machine.gpu_limit_bytes / machine.ram_bytes < 0.85
        assert machine.others_bytes < machine.ram_bytes
        assert machine.performance_cores >= 2


@pytest.mark.parametrize(
    ("text", "recorded_bytes"),
    [("A18 Pro", 5726633984), ("m4-16", 12713115648), ("M4 Pro:16:24", 19069665280),
     ("M5 Pro:20:48", 40200896512), ("M5 Max:40:128", None)],
)  # fmt: skip
def test_gpu_limit_is_as_recorded(text: str, recorded_bytes: int | None) -> None:
    """What Metal said on machines of these sizes is met to 0.01 %."""
    if recorded_bytes is None:
        info = json.loads((FIXTURES / "mlx_device_info_m5max_128g.json").read_text())
        recorded_bytes = info["max_recommended_working_set_size"]
    assert named_machine(text).gpu_limit_bytes == pytest.approx(recorded_bytes, rel=1e-4)


def test_gpu_limit_between_recorded_sizes_is_interpolated_and_says_so() -> None:
    """96 GB lies half way between 64 and 128; 512 GB is as the largest that was recorded."""
    fraction, source = working_set_fraction(96)
    assert fraction == pytest.approx((0.81 + 0.84) / 2)
    assert "interpolated between 64 and 128 GB" in source
    assert working_set_fraction(512) == (0.84, "0.84 x RAM, as on macOS 26 with 192 GB")
    assert working_set_fraction(4)[0] == pytest.approx(2 / 3, abs=1e-4)


@pytest.mark.parametrize(("text", "others_bytes"), [("m4-16", 3.5e9), ("M4:10:24", 5e9)])
def test_idle_others_by_memory_size(text: str, others_bytes: float) -> None:
    """An idle desktop holds 3.5 GB up to 16 GB of RAM and 5 GB above."""
    assert named_machine(text).others_bytes == others_bytes


@pytest.mark.parametrize(
    ("text", "flops", "words"),
    [
        ("M1:7:8", 2.6e12 * 7 / 8, "8-core M1"),
        ("M5 Pro:20:24", 5.7e12 * 2, "10-core M5"),
        ("M3 Ultra:60:96", 28.4e12 * 60 / 80, "80-core M3 Ultra"),
        ("M6", None, "nobody"),
    ],
)
def test_flops_that_nobody_states_follow_from_the_cores(
    text: str, flops: float | None, words: str
) -> None:
    """A bin without a stated rate has that of its chip's or generation's cores, if any is known."""
    spec = named_machine(text)
    assert spec.fp32_flops == (None if flops is None else pytest.approx(flops))
    assert words in spec.sources["fp32_flops"]


@pytest.mark.parametrize(
    ("brand", "gpu_cores", "ram_gb", "bandwidth"),
    [
        ("Apple M3 Max", 30, 36, 300),
        ("Apple M3 Max", 40, 48, 400),
        ("Apple M3 Max", None, 48, 400),
        ("Apple M3 Max", None, 47, 300),
        ("Apple M6", 12, 16, 153),
        ("Apple M6", 12, 32, 170),
        ("Apple M1 (Virtual)", 8, 16, None),
        ("VirtualApple @ 2.50GHz", None, 16, None),
        ("Apple M4", 12, 16, None),
    ],
)
def test_bin_of_a_mac_at_hand(
    brand: str, gpu_cores: int | None, ram_gb: int, bandwidth: int | None
) -> None:
    """Cores and memory tell bins apart, the lower one is taken where they do not; or none."""
    chip = find_chip(brand, gpu_cores, ram_gb * GIB)
    assert (None if chip is None else chip.memory_bandwidth_gb_s) == bandwidth


def test_any_memory_for_a_simulation() -> None:
    """A size that is not sold is given where it is asked for apart from the name."""
    spec = machine_with_ram("Mac Studio M3 Ultra:80", 192)
    assert (spec.name, spec.ram_bytes) == ("Mac Studio M3 Ultra:80:192", 192 * GIB)
    assert spec.gpu_limit_bytes == round(0.84 * 192 * GIB)
    with pytest.raises(ConfigError, match="leave one out"):
        machine_with_ram("M4:10:16", 20)
    with pytest.raises(ConfigError, match="no M4 is sold as 'M4:16'"):
        machine_with_ram("M4:16", 20)


def test_bins_of_a_chip_rise_in_the_order_of_the_table() -> None:
    """A later bin of a chip has no less of anything, so that the first that suits is the lower."""
    for lower, higher in itertools.combinations(chips(), 2):
        if higher.chip == lower.chip:
            assert higher.gpu_cores >= lower.gpu_cores
            assert higher.memory_bandwidth_gb_s >= lower.memory_bandwidth_gb_s
            assert (higher.fp32_tflops or 1e9) > (lower.fp32_tflops or 0)


@pytest.mark.parametrize(
    ("text", "cores"), [("M6", 6), ("M5", 4), ("M5 Max:40:128", 18), ("M3 Pro:14:18", 5)]
)
def test_only_efficiency_cores_are_left_out(text: str, cores: int) -> None:
    """The last level is left out where its cores are slow, and counts where they are fast."""
    assert named_machine(text).performance_cores == cores
