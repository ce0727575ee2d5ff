"""From readings to levels: thresholds, hysteresis, and what is missing."""

from typing import Any

import pytest
from support.looks import loaded

from brim.config.tree import GovernorSettings
from brim.core.machine import Conditions, Pressure, ThermalState
from brim.core.stance import PowerMode
from brim.governor.levels import MEMORY_HOLD_S, POWER_HOLD_S, Levels
from brim.governor.readings import Readings

GIB = 1024**3
NORMAL, WARNING, CRITICAL = Pressure


def readings(at_s: float = 0.0, **felt: Any) -> Readings:
    own = {name: felt.pop(name) for name in list(felt) if name in Readings.__struct_fields__}
    ram_bytes = own.pop("ram_bytes", 16 * GIB)
    return Readings(at_s=at_s, conditions=Conditions(**felt), ram_bytes=ram_bytes, **own)


def levels_after(*looks: Readings, settings: GovernorSettings | None = None) -> Levels:
    levels = Levels()
    for look in looks:
        levels = levels.after(look, settings or GovernorSettings())
    return levels


@pytest.mark.parametrize(
    ("felt", "level", "words"),
    [
        ({"pressure": WARNING}, WARNING, "the system reports warning pressure"),
        ({"pressure": CRITICAL}, CRITICAL, "the system reports critical pressure"),
        ({"compressor_ratio": 0.79}, NORMAL, ""),
        ({"compressor_ratio": 0.8}, WARNING, "the compressor holds 0.80 times"),
        ({"compressor_ratio": 1.5}, CRITICAL, "the compressor holds 1.50 times"),
        ({"stalled_percent": 9.9}, NORMAL, ""),
        ({"stalled_percent": 10.0}, WARNING, "waited for memory in 10 % of the last 10 s"),
        ({"stalled_percent": 40.0}, CRITICAL, "waited for memory in 40 %"),
        ({"available_bytes": int(0.031 * 16 * GIB)}, NORMAL, ""),
        ({"available_bytes": int(0.03 * 16 * GIB)}, WARNING, "0.52 GB of memory are left"),
        ({"available_bytes": int(0.015 * 16 * GIB)}, CRITICAL, "0.26 GB of memory are left"),
        ({"available_bytes": 250_000_000, "ram_bytes": 2 * GIB}, WARNING, "0.25 GB"),
        ({"available_bytes": 1, "ram_bytes": None}, NORMAL, ""),
        ({"available_bytes": 1, "compressor_ratio": 0.1}, NORMAL, ""),
    ],
)
def test_each_figure_of_memory_has_its_thresholds(
    felt: dict[str, Any], level: Pressure, words: str
) -> None:
    """One reading at a threshold enters its level at once and is quoted; one below does not."""
    memory = levels_after(readings(**felt)).memory
    assert memory.level is level
    assert words in memory.cause


@pytest.mark.parametrize(
    ("enters", "holds", "leaves"),
    [
        ({"compressor_ratio": 0.8}, {"compressor_ratio": 0.6}, {"compressor_ratio": 0.59}),
        ({"stalled_percent": 10}, {"stalled_percent": 5}, {"stalled_percent": 4.9}),
        (
            {"available_bytes": 400_000_000},
            {"available_bytes": 700_000_000},
            {"available_bytes": 800_000_000},
        ),
    ],
)
def test_a_level_is_left_lower_than_it_was_entered(
    enters: dict[str, Any], holds: dict[str, Any], leaves: dict[str, Any]
) -> None:
    """Between both thresholds a level stands for as long as it takes."""
    long_s = 10 * MEMORY_HOLD_S
    standing = levels_after(readings(0, **enters), readings(1, **holds), readings(long_s, **holds))
    assert standing.memory.level is WARNING
    left = standing.after(readings(long_s + 1, **leaves), GovernorSettings())
    left = left.after(readings(long_s + 1 + MEMORY_HOLD_S, **leaves), GovernorSettings())
    assert left.memory.level is NORMAL


def test_a_level_rises_at_once_and_falls_after_its_hold() -> None:
    """Down only when nothing was at the level for ten seconds; one such reading begins anew."""
    seen = []
    levels = Levels()
    for at_s, pressure in [
        (0, CRITICAL), (1, NORMAL), (9, NORMAL), (10, CRITICAL), (11, NORMAL), (20.9, NORMAL),
        (21, NORMAL),
    ]:  # fmt: skip
        levels = levels.after(readings(at_s, pressure=pressure), GovernorSettings())
        seen.append(levels.memory.level)
    assert seen == [CRITICAL] * 6 + [NORMAL]


def test_a_level_falls_to_the_worst_that_was_seen_meanwhile() -> None:
    """From critical to warning where a warning was among the lower readings, and then to normal."""
    looks = [readings(0, pressure=CRITICAL)]
    looks += [readings(s, pressure=WARNING if s == 3 else NORMAL) for s in range(1, 12)]
    levels = levels_after(*looks)
    assert levels.memory.level is WARNING
    assert levels.memory.cause == "the system reports warning pressure"
    for at_s in range(12, 23):
        levels = levels.after(readings(at_s, pressure=NORMAL), GovernorSettings())
    assert levels.memory.level is NORMAL


def test_what_is_missing_counts_as_nothing() -> None:
    """A machine that says nothing neither raises a level nor lets one fall."""
    warned = levels_after(readings(0, pressure=WARNING), readings(1, pressure=NORMAL))
    silent = warned.after(readings(100), GovernorSettings())
    assert silent.memory.level is WARNING
    assert levels_after(*(readings(s) for s in range(5))) == Levels()


def swapping(seconds: float, *, moved_in: float, moved_out: float) -> Levels:
    """Looks once a second at a machine that moves so many bytes a second."""
    looks = [
        readings(s, swapped_in_bytes_per_s=moved_in, swapped_out_bytes_per_s=moved_out)
        for s in range(int(seconds) + 1)
    ]
    return levels_after(*looks)


def test_swapping_both_ways_is_critical() -> None:
    """Three looks of it are; a burst in one or two is not, nor is a trickle."""
    assert swapping(2, moved_in=50e6, moved_out=50e6).memory.level is CRITICAL
    assert swapping(1, moved_in=50e6, moved_out=50e6).memory.level is NORMAL
    assert swapping(9, moved_in=1e6, moved_out=1e6).memory.level is NORMAL
    assert swapping(2, moved_in=50e6, moved_out=50e6).memory.cause == "the system swaps, in and out"


def test_stalls_and_swap_of_others_with_a_limit_of_their_own_do_not_count() -> None:
    """Where a quarter of all memory is available, giving ours back would help nobody."""
    felt = {"stalled_percent": 60.0, "swapped_in_bytes_per_s": 5e7, "swapped_out_bytes_per_s": 5e7}
    for available_bytes, level in ((4 * GIB, NORMAL), (4 * GIB - 1, CRITICAL)):
        looks = [readings(s, available_bytes=available_bytes, **felt) for s in range(4)]
        assert levels_after(*looks).memory.level is level
    assert levels_after(readings(stalled_percent=60.0)).memory.level is CRITICAL


def test_swapping_one_way_is_less() -> None:
    """Out makes room and is a warning; in is how relief looks."""
    assert swapping(5, moved_in=0, moved_out=50e6).memory.level is WARNING
    assert swapping(5, moved_in=50e6, moved_out=0).memory.level is NORMAL


def test_woken_looks_do_not_make_a_burst_last() -> None:
    """Looks in the same moment see the same burst."""
    looks = [
        readings(s / 10, swapped_in_bytes_per_s=1e9, swapped_out_bytes_per_s=1e9) for s in range(9)
    ]
    assert levels_after(*looks).memory.level is NORMAL


@pytest.mark.parametrize(
    ("felt", "mode", "words"),
    [
        ({"thermal": ThermalState.MODERATE}, PowerMode.FULL, ""),
        ({"thermal": ThermalState.HEAVY}, PowerMode.SAVING, "the machine's heat is heavy"),
        ({"thermal": ThermalState.TRAPPING}, PowerMode.HOT, "the machine's heat is trapping"),
        ({"thermal": ThermalState.SLEEPING}, PowerMode.HOT, "the machine's heat is sleeping"),
        ({"is_low_power": True}, PowerMode.SAVING, "low power mode is on"),
        ({"is_on_battery": True}, PowerMode.BATTERY, "the machine runs on battery"),
        (
            {"is_on_battery": True, "battery_percent": 20},
            PowerMode.SAVING,
            "the battery is at 20 %",
        ),
        ({"is_on_battery": True, "battery_percent": 21}, PowerMode.BATTERY, "battery"),
        ({"is_on_battery": False, "battery_percent": 5}, PowerMode.FULL, ""),
        ({"battery_percent": 5}, PowerMode.FULL, ""),
        ({"is_throttled": True}, PowerMode.FULL, ""),
    ],
)
def test_each_figure_of_power_has_its_mode(
    felt: dict[str, Any], mode: PowerMode, words: str
) -> None:
    """Heat, low power mode and the battery decide on the mode and are quoted."""
    power = levels_after(readings(**felt)).power
    assert power.level is mode
    assert words in power.cause


def test_throttling_counts_when_it_lasts() -> None:
    """For ten seconds on end it saves power; a moment without it begins anew."""
    throttled = [readings(s, is_throttled=True) for s in range(11)]
    assert levels_after(*throttled[:10]).power.level is PowerMode.FULL
    assert levels_after(*throttled).power.level is PowerMode.SAVING
    broken = [readings(s, is_throttled=s != 5) for s in range(11)]
    assert levels_after(*broken).power.level is PowerMode.FULL


def test_a_limit_that_somebody_set_is_no_heat() -> None:
    """A processor that is held back while its hottest sensor is cool works as ever."""
    cool = [readings(s, is_throttled=True, hottest_celsius=69.0) for s in range(20)]
    assert levels_after(*cool).power.level is PowerMode.FULL
    warm = [readings(s, is_throttled=True, hottest_celsius=71.0) for s in range(20)]
    assert levels_after(*warm).power.level is PowerMode.SAVING


def test_moderate_heat_does_not_undo_what_heavy_heat_began() -> None:
    """Slowed work keeps a machine moderate; only nominal heat lets it work at full speed again."""
    levels = levels_after(readings(0, thermal=ThermalState.HEAVY))
    for at_s in (1, 1 + 5 * POWER_HOLD_S):
        levels = levels.after(readings(at_s, thermal=ThermalState.MODERATE), GovernorSettings())
    assert levels.power.level is PowerMode.SAVING
    for at_s in (200, 200 + POWER_HOLD_S):
        levels = levels.after(readings(at_s, thermal=ThermalState.NOMINAL), GovernorSettings())
    assert levels.power.level is PowerMode.FULL


def test_the_low_battery_is_a_setting() -> None:
    """`governor.low_battery_percent` says where saving begins."""
    look = readings(is_on_battery=True, battery_percent=35)
    saving = levels_after(look, settings=GovernorSettings(low_battery_percent=40))
    assert saving.power.level is PowerMode.SAVING
    assert levels_after(look).power.level is PowerMode.BATTERY


def rereading(
    seconds: int, *, mb_per_s: float, faults_per_s: float | None = 20.0, **fields: Any
) -> Levels:
    """Looks once a second at a machine that reads so much again of what it had dropped."""
    fields.setdefault("models", (loaded(resident_bytes=GIB),))
    looks = [
        readings(s, refaulted_bytes_per_s=mb_per_s * 1e6, major_faults_per_s=faults_per_s, **fields)
        for s in range(seconds + 1)
    ]
    return levels_after(*looks)


def test_weights_that_are_read_again_are_a_warning_and_then_critical() -> None:
    """After two seconds a warning; critical once more came back than models have in memory."""
    assert rereading(1, mb_per_s=400).memory.level is NORMAL
    warned = rereading(2, mb_per_s=400).memory
    assert (warned.level, warned.cause) == (
        WARNING, "weights are read from disk again, 400 MB a second",
    )  # fmt: skip
    assert rereading(3, mb_per_s=400).memory.level is CRITICAL
    assert rereading(60, mb_per_s=119).memory.level is WARNING
    assert rereading(60, mb_per_s=29).memory.level is NORMAL


def test_weights_that_come_back_once_are_no_thrash() -> None:
    """A model of 8 GiB that wakes up reads what was dropped once: a warning at most."""
    woken = rereading(8, mb_per_s=1000, models=(loaded(resident_bytes=8 * GIB),))
    assert woken.memory.level is WARNING


def test_what_others_read_again_is_not_ours() -> None:
    """Where no process of ours waits for the disk, or nobody counts that, nothing is said."""
    assert rereading(9, mb_per_s=2000, faults_per_s=0.0).memory.level is NORMAL
    assert rereading(9, mb_per_s=2000, faults_per_s=None).memory.level is NORMAL
    assert rereading(9, mb_per_s=2000, available_bytes=4 * GIB).memory.level is NORMAL


def test_a_load_is_no_thrash_whatever_it_reads() -> None:
    """A model whose file was dropped since its last load is read again because it was asked for."""
    loading = (loaded(is_loading=True, resident_bytes=0),)
    levels = rereading(30, mb_per_s=3000, models=loading)
    assert levels.memory.level is NORMAL
    ready = readings(
        31,
        refaulted_bytes_per_s=3e9,
        major_faults_per_s=20.0,
        models=(loaded(resident_bytes=GIB),),
    )
    assert levels.after(ready, GovernorSettings()).memory.level is NORMAL


def test_rereading_is_left_lower_than_it_was_entered() -> None:
    """A warning stands at 16 MB a second, and falls ten seconds after the last look at 15."""
    levels = rereading(3, mb_per_s=40)
    felt = {"major_faults_per_s": 1.0, "models": (loaded(resident_bytes=GIB),)}
    for at_s in range(4, 40):
        levels = levels.after(
            readings(at_s, refaulted_bytes_per_s=16e6, **felt), GovernorSettings()
        )
    assert levels.memory.level is WARNING
    for at_s in range(40, 51):
        levels = levels.after(
            readings(at_s, refaulted_bytes_per_s=14e6, **felt), GovernorSettings()
        )
    assert levels.memory.level is NORMAL
