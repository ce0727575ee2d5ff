"""What a calibration times, and on which machines it refuses to."""

import msgspec
import pytest

from brim.bench.calibrate import standins, suite
from brim.bench.calibrate.readiness import objections
from brim.core.machine import Conditions, MachineSpec, Pressure, ThermalState

LAPTOP = MachineSpec(
    name="laptop", system="linux", ram_bytes=16 * 2**30, others_bytes=0, performance_cores=4
)
MAC = msgspec.structs.replace(LAPTOP, gpu_limit_bytes=12 * 2**30)


def test_decode_is_timed_under_every_number_of_threads() -> None:
    """One, all but one, all, and those that wait for each other also passively."""
    found = {(s.num_threads, s.wait_policy) for s in suite.settings(LAPTOP)}
    assert found == {
        (1, "spin3000"), (3, "spin3000"), (4, "spin3000"), (3, "passive"), (4, "passive"),
    }  # fmt: skip
    assert suite.settings(LAPTOP)[0] == suite.base_setting(LAPTOP)


def test_a_gpu_makes_threads_and_rearranging_no_question() -> None:
    """Where it computes, one setting is left and weights stay as they are."""
    jobs = suite.jobs(MAC)
    assert {job.setting.num_threads for job in jobs} == {3}
    assert {job.setting.wait_policy for job in jobs} == {"passive"}
    assert not any(job.setting.repack_weights for job in jobs)


def test_a_cache_is_filled_once_before_it_is_imported() -> None:
    """Each name's first job fills it, under the base's threads; the others differ in threads."""
    named = [job for job in suite.jobs(LAPTOP) if job.kept_kv]
    for name in {job.kept_kv for job in named}:
        first, *others = [job for job in named if job.kept_kv == name]
        assert first.fills
        assert not any(other.fills for other in others)
        assert {job.model for job in others} == {first.model}
        assert {job.depths for job in others} == {first.depths}


def test_every_combination_of_kv_types_varies_one_thing_at_a_time() -> None:
    """K apart from V, flash attention on and off, on one stand-in."""
    found = {
        (job.setting.kv_type_k, job.setting.kv_type_v, job.setting.flash_attention)
        for job in suite.jobs(LAPTOP)
        if job.model == standins.GROUPED
    }
    assert {
        ("f16", "f16", True), ("f16", "f16", False), ("q8_0", "f16", True), ("q8_0", "q8_0", True),
        ("q4_0", "q4_0", True),
    } <= found  # fmt: skip


def test_prompts_are_read_under_every_wait_policy() -> None:
    """Otherwise prefill under the other policy could not be forecast."""
    read = {job.setting.wait_policy for job in suite.jobs(LAPTOP) if job.prompts}
    assert read == {"passive", "spin3000"}


def test_standins_are_pure_and_larger_than_a_cache() -> None:
    """Every matrix has the type whose cost is wanted; the wide ones are 80 MB and more."""
    found = standins.blueprints()
    for type_name in standins.WIDE_TYPES:
        plan = found[standins.wide(type_name)]
        assert {t.type_name for t in plan.tensors if len(t.shape) > 1} == {type_name}
        assert plan.weights_bytes > 80e6
    assert sum(plan.file_bytes for plan in found.values()) == standins.needed_bytes() < 2e9


@pytest.mark.parametrize(
    ("reading", "words"),
    [
        (Conditions(busy_fraction=0.47), "use 47% of the processors"),
        (Conditions(thermal=ThermalState.HEAVY), "hot"),
        (Conditions(is_throttled=True), "throttled"),
        (Conditions(is_low_power=True), "low-power"),
        (Conditions(pressure=Pressure.WARNING), "pressure is warning"),
        (Conditions(stalled_percent=20.0), "waited for memory 20 %"),
        (Conditions(compressor_ratio=1.5), "compressed"),
    ],
)
def test_each_reading_that_would_mislead_is_named(reading: Conditions, words: str) -> None:
    """One objection for one reading, in words that say which."""
    (found,) = objections(reading)
    assert words in found


def test_swapping_is_told_from_two_readings() -> None:
    """What was swapped out long ago is no objection; what goes out now is."""
    before = Conditions(swap_used_bytes=2**30, swapped_out_bytes=2**30)
    assert objections(before, before) == ()
    now = msgspec.structs.replace(before, swapped_out_bytes=2**30 + 5 * 2**20)
    assert objections(before, now) == ("it is swapping (5 MiB just now)",)


def test_what_is_not_known_is_no_objection() -> None:
    """A virtual machine tells neither heat nor throttling."""
    assert objections(Conditions(), Conditions()) == ()
    assert objections(Conditions(busy_fraction=0.05, thermal=ThermalState.NOMINAL)) == ()
