"""Forecasts from a calibration whose costs are known."""

import functools
import itertools

import msgspec
import pytest
from support import calibrated

from brim.core.calibration import Calibration
from brim.core.forecast import SpeedForecast, SpeedRange, SpeedShape
from brim.core.model import ModelSpec
from brim.errors import Unsupported
from brim.planner.calibrated_speed import (
    OTHER_THREADS_SPREAD,
    forecast_calibrated,
    forecast_from_bandwidth,
    load_s,
)
from brim.planner.cost_lookup import OTHER_TYPE_SPREAD

MODEL = calibrated.shape(num_layers=16, feed_forward=8192, vocab_size=128_256)


@functools.cache
def calibration() -> Calibration:
    return calibrated.calibration()


def forecast(model: SpeedShape = MODEL, **changes: object) -> SpeedForecast:
    options: dict[str, object] = {
        "engine": "llamacpp", "kv_type_k": "f16", "kv_type_v": "f16", "flash_attention": True,
        "repack_weights": False, "num_threads": 1, "num_batch_threads": 2, "depth_tokens": 0,
        "prompt_tokens": 512,
    }  # fmt: skip
    known = changes.pop("calibration", calibration())
    return forecast_calibrated(model, known, **(options | changes))  # type: ignore[arg-type]


def width(rate: SpeedRange) -> float:
    return rate.high / rate.low


def test_a_token_takes_its_units_times_their_costs() -> None:
    """Decode of a model that is all weights is what its bytes cost, and little else."""
    expected_s = MODEL.active_bytes * 4.6e-11 + 16 * 2e-5 + 2e-5
    assert 1 / forecast().decode_tok_s.expected == pytest.approx(expected_s, rel=0.02)


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_a_deeper_context_never_decodes_faster(kv_type: str) -> None:
    """Each depth is slower than the one before, at low, expected and high."""
    rates = [
        forecast(depth_tokens=depth, kv_type_k=kv_type, kv_type_v=kv_type).decode_tok_s
        for depth in (0, 1024, 4096, 32768)
    ]
    for shallow, deep in itertools.pairwise(rates):
        assert deep.low < shallow.low
        assert deep.expected < shallow.expected
        assert deep.high < shallow.high


def test_nothing_is_forecast_above_bandwidth_over_bytes() -> None:
    """With costs of nothing left, the memory still has to be read."""
    free = [
        msgspec.structs.replace(costs, decode_s=dict.fromkeys(costs.decode_s, 1e-15))
        for costs in calibration().costs
    ]
    known = msgspec.structs.replace(calibration(), costs=tuple(free))
    found = forecast(calibration=known)
    assert found.decode_ceiling_tok_s == pytest.approx(45e9 / MODEL.active_bytes)
    assert found.decode_tok_s.low == found.decode_tok_s.high == found.decode_ceiling_tok_s


def test_rearranged_weights_are_forecast_by_their_own_costs() -> None:
    """Faster decode and slower prefill, as was measured."""
    plain, repacked = forecast(), forecast(repack_weights=True)
    assert repacked.decode_tok_s.expected > 1.05 * plain.decode_tok_s.expected
    assert repacked.prefill_tok_s.expected < 0.7 * plain.prefill_tok_s.expected


def test_a_type_that_is_never_rearranged_is_the_same_either_way() -> None:
    """Asking for it costs a forecast nothing, and derives nothing."""
    model = calibrated.shape("Q8_0")
    assert forecast(model, repack_weights=True) == forecast(model)


def test_a_tensor_type_that_was_not_measured_widens_the_range_and_is_named() -> None:
    """IQ4_XS is taken as Q4_K, by weight and not by byte."""
    other = forecast(calibrated.shape("IQ4_XS", num_layers=16))
    known = forecast(calibrated.shape("Q4_K", num_layers=16))
    assert other.decode_tok_s.expected == pytest.approx(known.decode_tok_s.expected, rel=0.01)
    assert width(other.decode_tok_s) > 0.99 * OTHER_TYPE_SPREAD**2 * width(known.decode_tok_s)
    assert other.reasons["derived"] == "IQ4_XS weights as Q4_K"


@pytest.mark.parametrize(("key", "value"), [("q4_0", "q4_0"), ("f16", "q8_0"), ("q5_1", "f16")])
def test_kv_types_that_were_not_measured_together_are_derived(key: str, value: str) -> None:
    """The forecast is no faster than f16 on a machine where quantised KV costs, and says so."""
    found = forecast(depth_tokens=8192, kv_type_k=key, kv_type_v=value)
    assert found.decode_tok_s.expected <= 1.02 * forecast(depth_tokens=8192).decode_tok_s.expected
    assert f"KV {key}/{value}" in found.reasons["derived"]


def test_other_threads_widen_the_range_and_are_named() -> None:
    """Six threads are forecast from the one that was measured."""
    found = forecast(num_threads=6, num_batch_threads=6)
    assert width(found.decode_tok_s) == pytest.approx(
        OTHER_THREADS_SPREAD**2 * width(forecast().decode_tok_s), rel=0.01
    )
    assert found.prefill_tok_s.expected == pytest.approx(
        3 * forecast().prefill_tok_s.expected, rel=0.01
    )
    assert "asked of 6 and 6" in found.reasons["threads"]


def test_several_sequences_share_the_weights() -> None:
    """Eight at once are slower each and faster together."""
    one, eight = forecast(), forecast(num_sequences=8)
    assert eight.decode_tok_s.expected < one.decode_tok_s.expected
    assert 8 * eight.decode_tok_s.expected > 1.5 * one.decode_tok_s.expected


def test_smaller_micro_batches_read_the_weights_more_often() -> None:
    """A prompt of 1,024 tokens takes longer in pieces of 64."""
    small, large = (
        forecast(prompt_tokens=1024, micro_batch_tokens=size).prefill_tok_s for size in (64, 1024)
    )
    assert small.expected < large.expected


def test_another_engine_is_refused() -> None:
    """Costs of one engine say nothing about another."""
    with pytest.raises(Unsupported, match="run: brim calibrate --engine mlx"):
        forecast(engine="mlx")


def test_a_calibration_that_was_forced_says_so_in_every_forecast() -> None:
    """What `--anyway` overrode stands among the reasons."""
    known = msgspec.structs.replace(calibration(), warnings=("it is hot",))
    assert forecast(calibration=known).reasons["calibration"] == "measured in spite of: it is hot"
    assert "calibration" not in forecast().reasons


def test_the_source_names_day_engine_and_version() -> None:
    """A reader can tell what a figure rests on."""
    assert forecast().source == "calibration of 2027-01-15 (llamacpp 1.2.3)"


def test_a_probe_of_bandwidth_gives_a_wide_range_below_the_ceiling() -> None:
    """Three and a half times from low to high, and what would narrow it."""
    found = forecast_from_bandwidth(MODEL, 40e9)
    assert found.decode_ceiling_tok_s == pytest.approx(40e9 / MODEL.active_bytes)
    assert found.decode_tok_s.high < 40e9 / MODEL.active_bytes
    assert width(found.decode_tok_s) == pytest.approx(3.6)
    assert "brim calibrate" in found.reasons["range"]


def test_loading_reads_the_file_and_rearranges_what_is_rearranged(llama_1b: ModelSpec) -> None:
    """From the disk at its rate, mapped, and 0.5 GB of it copied at 2 GB/s."""
    spec = msgspec.structs.replace(llama_1b, matrix_bytes={"Q4_K": 500_000_000, "Q6_K": 10**8})
    mapped = load_s(spec, calibration(), repack_weights=False)
    size = spec.weights_bytes
    assert mapped == pytest.approx(0.52 + 128_256e-6 + size / 10e9 + size / 1e9, rel=0.02)
    assert load_s(spec, calibration(), repack_weights=True) == pytest.approx(
        mapped + 0.25, rel=0.02
    )
