"""Fitting costs, on samples of a machine whose costs are known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import calibrated

from brim.bench.calibrate.fit import fit_costs, fit_terms, non_negative_least_squares
from brim.planner.speed_terms import KvTypes, decode_terms, prefill_terms


@given(st.integers(0, 10_000), st.integers(2, 6))
def test_the_solution_is_the_best_without_negative_elements(seed: int, num_terms: int) -> None:
    """No element is negative, and none could change for the better (the conditions of Karush)."""
    rng = np.random.default_rng(seed)
    matrix, target = rng.random((12, num_terms)), rng.standard_normal(12) + 1
    found = non_negative_least_squares(matrix, target)
    gradient = matrix.T @ (target - matrix @ found)
    assert (found >= 0).all()
    assert gradient.max() < 1e-6
    assert np.abs(gradient[found > 0]).max(initial=0.0) < 1e-6


def test_costs_are_found_again() -> None:
    """Undisturbed samples give back the seconds of each unit that can be told apart."""
    costs = calibrated.calibration().costs[0]
    for term in ("bytes Q4_K", "bytes Q4_K repacked", "bytes F16", "scores q8_0/q8_0 flash"):
        assert costs.decode_s[term] == pytest.approx(calibrated.DECODE_S[term], rel=0.01)
    assert costs.prefill_s["bytes Q4_K"] == pytest.approx(3.3e-12, rel=0.05)


def test_a_model_ten_times_as_large_is_forecast_from_small_ones() -> None:
    """Costs carry over to layers, widths and vocabularies that no stand-in had."""
    costs = calibrated.calibration().costs[0]
    large = calibrated.shape(
        "Q4_K", num_layers=32, hidden_size=4096, key_dim=128, feed_forward=14336, vocab_size=128_256
    )
    kv = KvTypes("q8_0", "q8_0", True)
    decode = decode_terms(large, kv=kv, repack_weights=False, depth_tokens=8192)
    prefill = prefill_terms(
        large, kv=kv, repack_weights=False, depth_tokens=0, prompt_tokens=2048,
        micro_batch_tokens=512,
    )  # fmt: skip
    for terms, fitted, true in (
        (decode, costs.decode_s, calibrated.DECODE_S),
        (prefill, costs.prefill_s, calibrated.PREFILL_S),
    ):
        expected, given_s = (
            sum(amount * table.get(term, 0.0) for term, amount in terms.items())
            for table in (true, fitted)
        )
        assert given_s == pytest.approx(expected, rel=0.05)


def test_disturbed_samples_hardly_move_the_costs() -> None:
    """A third of one round at twice its time moves a cost by at most 5 %, and widens the range."""
    quiet = calibrated.calibration().costs[0]
    first_round = len(calibrated.samples()) // 2
    noisy = calibrated.calibration(
        lambda number: 2.0 if number % 3 == 0 and number < first_round else 1.0
    ).costs[0]
    for term in ("bytes Q4_K", "bytes Q8_0", "scores q8_0/q8_0 flash"):
        assert noisy.decode_s[term] == pytest.approx(quiet.decode_s[term], rel=0.05)
    assert noisy.decode_ratio_high > 1.3
    assert quiet.decode_ratio_high < 1.2


def test_other_waiting_scales_prefill_by_what_was_read_under_it() -> None:
    """One prompt read under another wait policy moves all of its prefill costs."""
    base = calibrated.samples()
    spinning = [
        type(sample)(
            model=sample.model, shape=sample.shape, num_prompt=sample.num_prompt,
            num_generate=sample.num_generate, depth=sample.depth,
            setting=type(sample.setting)(
                num_threads=2, num_batch_threads=2, wait_policy="spin3000",
                repack_weights=sample.setting.repack_weights,
                kv_type_k=sample.setting.kv_type_k, kv_type_v=sample.setting.kv_type_v,
                flash_attention=sample.setting.flash_attention,
            ),
            samples_s=tuple(0.8 * seconds for seconds in sample.samples_s),
        )
        for sample in base
        if not sample.num_prompt or (sample.model == "wide-Q4_K" and sample.num_prompt == 512)
    ]  # fmt: skip
    passive, spin = fit_costs([*base, *spinning])
    assert (passive.wait_policy, spin.wait_policy) == ("passive", "spin3000")
    for term, cost in passive.prefill_s.items():
        assert spin.prefill_s[term] == pytest.approx(0.8 * cost, rel=0.02)
    assert spin.decode_s["bytes Q8_0"] == pytest.approx(0.8 * 3.5e-11, rel=0.02)


def test_cases_that_took_longer_than_the_others_make_likely_count_less() -> None:
    """Two of twelve at twice their time move neither cost by more than 5 %."""
    cases = [({"a": 1.0, "b": float(b)}, 2.0 + 3.0 * b) for b in range(12)]
    for number in (3, 9):
        cases[number] = (cases[number][0], 2 * cases[number][1])
    costs = fit_terms(cases)
    assert costs == {"a": pytest.approx(2.0, rel=0.05), "b": pytest.approx(3.0, rel=0.05)}


def test_a_term_in_no_case_has_no_cost() -> None:
    """Costs that nothing was measured of are absent, so that a forecast has to derive them."""
    assert fit_terms([({"a": 1.0, "b": 0.0}, 2.0), ({"a": 2.0}, 4.0)]) == {"a": pytest.approx(2.0)}


def test_load_costs_are_told_apart() -> None:
    """Mapping, rearranging and the vocabulary each get their own share."""
    load = calibrated.calibration().load
    assert load.fixed_s == pytest.approx(0.52, rel=0.05)
    assert load.per_token_of_vocabulary_s == pytest.approx(1e-6, rel=0.01)
    assert load.mapped_bytes_per_s == pytest.approx(10e9, rel=0.01)
    assert load.repacked_bytes_per_s == pytest.approx(2e9, rel=0.01)
