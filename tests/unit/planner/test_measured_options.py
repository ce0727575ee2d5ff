"""Load options by what was measured of the machine."""

import msgspec
import pytest
from support import calibrated

from brim.core.calibration import Calibration, FittedCosts
from brim.core.machine import MachineSpec
from brim.core.model import KvLayer, ModelSpec
from brim.core.plan import Objective, Plan
from brim.planner.plan import make_plan


@pytest.fixture(scope="module")
def measured() -> Calibration:
    """Quantised V is slow here, repacking gains decode and loses prefill."""
    return calibrated.calibration()


@pytest.fixture
def llama_1b(llama_1b: ModelSpec) -> ModelSpec:
    """The usual one, with what its layers store: what attention costs depends on it."""
    layers = (KvLayer(key_width=512, value_width=512),) * 16
    return msgspec.structs.replace(llama_1b, kv_layers=layers)


def planned(
    llama_1b: ModelSpec, laptop: MachineSpec, calibration: Calibration, objective: Objective
) -> Plan:
    return make_plan(
        llama_1b, laptop, engine="llamacpp", objective=objective, calibration=calibration,
        context_tokens=8192,
    )  # fmt: skip


def test_objectives_choose_what_was_quicker(
    llama_1b: ModelSpec, laptop: MachineSpec, measured: Calibration
) -> None:
    """Decode takes rearranged weights, prefill leaves them, and a slow quantised V is avoided."""
    decode = planned(llama_1b, laptop, measured, Objective.DECODE)
    prefill = planned(llama_1b, laptop, measured, Objective.PREFILL)
    assert decode.kv_type_v == prefill.kv_type_v == "f16"
    assert not prefill.repack_weights
    assert prefill.flash_attention
    assert "measured here: decode" in decode.reasons["repack_weights"]
    assert "q8_0" in decode.reasons["kv_type"]


def test_memory_as_objective_takes_the_small_cache(
    llama_1b: ModelSpec, laptop: MachineSpec, measured: Calibration
) -> None:
    """Whatever it costs in speed, memory is saved where it is the objective."""
    plan = planned(llama_1b, laptop, measured, Objective.MEMORY)
    assert (plan.kv_type_k, plan.kv_type_v) == ("q8_0", "q8_0")
    assert not plan.repack_weights


def test_a_quantised_cache_that_costs_little_is_taken(
    llama_1b: ModelSpec, laptop: MachineSpec, measured: Calibration
) -> None:
    """Where q8_0 is as fast as f16, half of the cache's bytes decide."""
    quick = msgspec.structs.replace(
        measured,
        costs=tuple(
            msgspec.structs.replace(
                costs,
                decode_s=costs.decode_s | _as_f16(costs.decode_s),
                prefill_s=costs.prefill_s | _as_f16(costs.prefill_s),
            )
            for costs in measured.costs
        ),
    )
    assert planned(llama_1b, laptop, quick, Objective.DECODE).kv_type_v == "q8_0"


def _as_f16(seconds: dict[str, float]) -> dict[str, float]:
    """Scores over a quantised cache at the price of the cheapest over f16."""
    least = min(seconds["scores f16/f16"], seconds["scores f16/f16 flash"])
    return {"scores q8_0/q8_0 flash": least}


def test_memory_still_comes_first(
    llama_1b: ModelSpec, laptop: MachineSpec, measured: Calibration
) -> None:
    """The quickest options give way where they do not fit."""
    wanted = planned(llama_1b, laptop, measured, Objective.DECODE)
    less = wanted.memory.total_bytes - 1
    plan = make_plan(
        llama_1b, laptop, engine="llamacpp", calibration=measured, context_tokens=8192,
        free_bytes=less,
    )  # fmt: skip
    assert plan.memory.total_bytes <= less


def test_threads_and_waiting_are_those_measured(
    llama_1b: ModelSpec, laptop: MachineSpec, measured: Calibration
) -> None:
    """A plan runs with the threads and the wait policy that its costs were fitted with."""
    plan = planned(llama_1b, laptop, measured, Objective.DECODE)
    assert (plan.num_threads, plan.num_batch_threads) == (1, 2)
    assert plan.environment["OMP_WAIT_POLICY"] == "passive"


@pytest.mark.parametrize(("gain", "policy"), [(0.9, "GOMP_SPINCOUNT"), (0.98, "OMP_WAIT_POLICY")])
def test_spinning_must_gain_something(
    llama_1b: ModelSpec, laptop: MachineSpec, measured: Calibration, gain: float, policy: str
) -> None:
    """Threads that spin burn power while they wait, so a gain within the spread is left."""

    def spinning(costs: FittedCosts) -> FittedCosts:
        return msgspec.structs.replace(
            costs,
            wait_policy="spin3000",
            decode_s={name: cost * gain for name, cost in costs.decode_s.items()},
            prefill_s={name: cost * gain for name, cost in costs.prefill_s.items()},
        )

    both = (*measured.costs, *(spinning(costs) for costs in measured.costs))
    calibration = msgspec.structs.replace(measured, costs=both)
    plan = planned(llama_1b, laptop, calibration, Objective.DECODE)
    assert policy in plan.environment


def test_a_shared_pool_wants_flash_attention(
    llama_1b: ModelSpec, laptop: MachineSpec, measured: Calibration
) -> None:
    """Without flash attention every row goes through everybody's cells, which decides for it."""
    several = make_plan(
        llama_1b, laptop, engine="llamacpp", calibration=measured, context_tokens=8192,
        max_sequences=8,
    )  # fmt: skip
    alone = planned(llama_1b, laptop, measured, Objective.DECODE)
    assert (alone.flash_attention, several.flash_attention) == (False, True)
