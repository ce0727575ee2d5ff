"""What is ranked before what, and the sentence that says why."""

import msgspec
import pytest

from brim.core.forecast import Forecast, SpeedForecast, SpeedRange
from brim.core.machine import MachineSpec
from brim.core.model import ModelSpec
from brim.core.plan import Grant, Plan, Verdict
from brim.planner.plan import make_plan
from brim.planner.recommend import (
    Band,
    Candidate,
    MachineFit,
    Use,
    capability,
    cheapest_first,
    lost_doublings,
    recommend,
)

GIB = 2**30


@pytest.fixture
def plan(llama_1b: ModelSpec, mac: MachineSpec) -> Plan:
    return make_plan(llama_1b, mac, engine="llamacpp")


def around(tok_s: float) -> SpeedRange:
    return SpeedRange(low=0.8 * tok_s, expected=tok_s, high=1.2 * tok_s)


def forecast_of(
    tok_s: float | None, *, read_tok_s: float = 1000.0, warm: float = 1.0, full: float = 0.5
) -> Forecast:
    if tok_s is None:
        return Forecast()
    speed = SpeedForecast(
        decode_tok_s=around(tok_s), prefill_tok_s=around(read_tok_s), decode_ceiling_tok_s=None,
        source="a test",
    )  # fmt: skip
    return Forecast(
        speed=speed,
        sustained_decode_tok_s=around(tok_s * warm),
        full_decode_tok_s=around(tok_s * full),
    )


def candidate(
    plan: Plan, name: str, *, billions: float = 8.0, verdict: Verdict = Verdict.COMFORTABLE,
    tok_s: float | None = 50.0, quant: str = "Q4_K_M", percent: float | None = 2.8,
    released: str = "2025-04", short_bytes: int = 0, warm: float = 1.0, read_tok_s: float = 1000,
) -> Candidate:  # fmt: skip
    num_parameters = round(billions * 1e9)
    model = msgspec.structs.replace(
        plan.model, name=name, num_parameters=num_parameters, active_parameters=num_parameters
    )
    return Candidate(
        name=name, quant=quant, released=released,
        plan=msgspec.structs.replace(plan, model=model),
        grant=Grant(
            verdict=verdict, asked_bytes=round(billions * 0.6e9), budget_bytes=12 * GIB,
            short_bytes=short_bytes, binding="gpu limit",
        ),
        forecast=forecast_of(tok_s, read_tok_s=read_tok_s, warm=warm),
        perplexity_increase_percent=percent,
    )  # fmt: skip


def names(candidates: list[Candidate], use: Use = Use.CHAT) -> list[str]:
    return [each.candidate.name for each in recommend(candidates, use)]


def test_the_more_capable_model_comes_first(plan: Plan) -> None:
    """Among models that fit and answer in time, size decides."""
    assert names([candidate(plan, "small"), candidate(plan, "large", billions=14)]) == [
        "large",
        "small",
    ]


def test_fit_and_speed_come_before_capability(plan: Plan) -> None:
    """Comfort and answering in time outweigh size; what does not fit is last, nearest first."""
    ranked = names(
        [
            candidate(plan, "far", billions=70, verdict=Verdict.NO, short_bytes=30 * GIB),
            candidate(plan, "near", billions=32, verdict=Verdict.NO, short_bytes=6 * GIB),
            candidate(plan, "slow", billions=30, tok_s=9.9),
            candidate(plan, "tight", billions=20, verdict=Verdict.TIGHT),
            candidate(plan, "good", billions=4),
        ]
    )
    assert ranked == ["good", "tight", "slow", "near", "far"]


def test_speed_short_of_interactive_is_worth_as_much_size(plan: Plan) -> None:
    """A model at half the interactive speed must be more than twice as large to come first."""
    fast = candidate(plan, "fast")
    assert names([candidate(plan, "slower", billions=15, tok_s=10), fast]) == ["fast", "slower"]
    assert names([fast, candidate(plan, "larger", billions=17, tok_s=10)]) == ["larger", "fast"]
    assert names([fast, candidate(plan, "near", billions=10, tok_s=16.5)]) == ["near", "fast"]


def test_a_model_stands_once_in_its_best_quant(plan: Plan) -> None:
    """Of several quants the best one that is still fast is taken, and the others are kept."""
    quants = [
        candidate(plan, "one", quant="Q8_0", percent=0.04, tok_s=12),
        candidate(plan, "one", quant="Q6_K", percent=0.35, tok_s=21),
        candidate(plan, "one", quant="Q4_K_M", percent=2.8, tok_s=30),
    ]
    [one] = recommend(quants, Use.CHAT)
    assert one.candidate.quant == "Q6_K"
    assert [other.quant for other in one.others] == ["Q4_K_M", "Q8_0"]


def test_of_equal_forms_the_machines_own_engine_is_taken(plan: Plan) -> None:
    """Between an MLX and a GGUF form of the same worth the default engine decides, not bytes."""
    gguf = candidate(plan, "one", quant="Q8_0", percent=0.04)
    larger = msgspec.structs.replace(gguf.grant, asked_bytes=gguf.grant.asked_bytes + 1)
    mlx = msgspec.structs.replace(
        gguf, quant="MLX 8bit", plan=msgspec.structs.replace(gguf.plan, engine="mlx"), grant=larger
    )
    for default, quant in (("mlx", "MLX 8bit"), ("llamacpp", "Q8_0"), (None, "Q8_0")):
        [one] = recommend([gguf, mlx], Use.CHAT, default_engine=default)
        assert one.candidate.quant == quant


def test_the_band_is_that_of_the_warm_machine(plan: Plan) -> None:
    """A burst above the bound does not count where heat takes it back."""
    [hot] = recommend([candidate(plan, "hot", tok_s=25, warm=0.7)], Use.CHAT)
    assert hot.band is Band.USABLE
    assert hot.band_tok_s == pytest.approx(17.5)


def test_long_texts_are_judged_with_a_full_context(plan: Plan) -> None:
    """For long texts it is the warm machine's speed at the end of the context that counts."""
    [long] = recommend([candidate(plan, "long", tok_s=40, warm=0.75)], Use.LONG)
    assert long.band is Band.USABLE
    assert long.band_tok_s == pytest.approx(40 * 0.5 * 0.75)
    assert "15 tok/s once warm with a full context" in long.reason


def test_embedders_are_judged_by_what_they_read(plan: Plan) -> None:
    """An embedder does not decode: its band is that of reading a passage."""
    [embedder] = recommend([candidate(plan, "embedder", tok_s=1, read_tok_s=900)], Use.EMBED)
    assert embedder.band is Band.USABLE
    assert embedder.band_tok_s == 900
    assert embedder.reason.endswith("900 tokens read a second is usable")


def test_an_unknown_speed_is_said_and_not_held_against_a_model(plan: Plan) -> None:
    """Without a forecast the order is by fit and capability, and the sentence says so."""
    ranked = recommend(
        [candidate(plan, "a", tok_s=None), candidate(plan, "b", billions=9, tok_s=None)], Use.CHAT
    )
    assert [each.candidate.name for each in ranked] == ["b", "a"]
    assert ranked[0].reason.endswith("its speed on this machine is not known")


def test_reasons_are_one_sentence_with_figures(plan: Plan) -> None:
    """The sentence names size, quant, fit and speed, or the bytes short and what binds."""
    fits, lacks = recommend(
        [
            candidate(plan, "fits"),
            candidate(plan, "lacks", verdict=Verdict.NO, short_bytes=2 * GIB),
        ],
        Use.CHAT,
    )
    assert fits.reason == (
        "8 B parameters of 2025-04; Q4_K_M costs as much as 18 % fewer parameters; "
        "fits with 4.47 GiB of 12.00 GiB; 50 tok/s once warm is interactive"
    )
    assert lacks.reason == "needs 4.47 GiB, 2.00 GiB more than gpu limit leaves"


def test_capability_is_size_age_and_quant() -> None:
    """Active parameters, a newer release and a finer quant each raise it, and only they do."""
    base = capability(30 * 10**9, 3 * 10**9, "2025-04", 2.8)
    assert capability(30 * 10**9, 6 * 10**9, "2025-04", 2.8) == pytest.approx(base + 0.5)
    assert capability(30 * 10**9, 3 * 10**9, "2026-06", 2.8) == pytest.approx(base + 2)
    assert capability(30 * 10**9, 3 * 10**9, "2025-04", 0.0) > base
    assert capability(30 * 10**9, 3 * 10**9, "2025-04", 10.5) < base
    assert lost_doublings(0.0) == 0.0


def test_machines_are_sorted_by_memory_then_bandwidth(plan: Plan, mac: MachineSpec) -> None:
    """Least memory first, then the slower chip; machines that do not hold the model are out."""

    def fit(ram_gib: int, bandwidth: int, verdict: Verdict = Verdict.COMFORTABLE) -> MachineFit:
        machine = msgspec.structs.replace(
            mac, name=f"{ram_gib}/{bandwidth}", ram_bytes=ram_gib * GIB, memory_bandwidth=bandwidth
        )
        grant = Grant(verdict=verdict, asked_bytes=1, budget_bytes=1)
        return MachineFit(machine=machine, plan=plan, grant=grant, forecast=Forecast(), band=None)

    fits = [fit(64, 400), fit(16, 120, Verdict.NO), fit(32, 400), fit(32, 100, Verdict.TIGHT)]
    assert [each.machine.name for each in cheapest_first(fits)] == ["32/100", "32/400", "64/400"]
