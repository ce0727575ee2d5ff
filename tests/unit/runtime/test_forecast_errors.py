"""What a load was forecast to take, beside what it took."""

from collections.abc import Iterator

import msgspec
import pytest
from support.serving import MACHINE, toy_plan

from brim.core.memory import Footprint, MemoryTerms
from brim.core.plan import Plan
from brim.ledger.correction import PastErrors, corrected
from brim.ledger.history import ForecastHistory
from brim.runtime.forecast_errors import LoadRecord, measured_terms, subject_of

pytestmark = pytest.mark.anyio


@pytest.fixture
def history() -> Iterator[ForecastHistory]:
    history = ForecastHistory(None)
    yield history
    history.close()


@pytest.fixture
def plan() -> Plan:
    memory = MemoryTerms(
        weights_bytes=100, kv_bytes=200, compute_bytes=300, overhead_bytes=400,
        compute_touched_bytes=250,
    )  # fmt: skip
    return msgspec.structs.replace(toy_plan(), memory=memory)


async def test_a_backends_report_is_kept_by_term(history: ForecastHistory, plan: Plan) -> None:
    """Output buffers belong to the compute term; what was planned stands beside each."""
    record = LoadRecord(plan, MACHINE, history)
    footprint = Footprint(
        weights_bytes=100, mapped_weights_bytes=0, kv_bytes=220, compute_bytes=250, output_bytes=20
    )
    await record.loaded(footprint)
    assert [(each.term, each.planned_bytes, each.measured_bytes) for each in record.errors()] == [
        ("weights_bytes", 100, 100), ("kv_bytes", 200, 220), ("compute_bytes", 300, 270),
    ]  # fmt: skip
    ratios = history.past_errors(subject_of(plan, MACHINE)).ratios
    assert ratios == {"weights_bytes": (1.0,), "kv_bytes": (1.1,), "compute_bytes": (0.9,)}


async def test_only_a_full_process_or_an_overrun_says_something_of_the_total(
    history: ForecastHistory, plan: Plan
) -> None:
    """950 bytes are forecast to be touched: fewer count once the context was full, more at once."""
    record = LoadRecord(plan, MACHINE, history)

    async def measured(resident_bytes: int, has_filled: bool) -> list[int]:
        await record.measured(resident_bytes, has_filled=has_filled)
        return [each.measured_bytes for each in record.errors()]

    assert await measured(900, False) == []
    assert await measured(960, False) == [960]
    assert await measured(965, True) == [960], "half a percent is not worth a write"
    assert await measured(980, True) == [980]
    assert await measured(500, True) == [980], "the most that it ever held counts"
    assert record.errors()[0].planned_bytes == 950
    again = LoadRecord(plan, MACHINE, history)
    await again.measured(800, has_filled=True)
    assert history.past_errors(subject_of(plan, MACHINE)).ratios["total_bytes"] == pytest.approx(
        (800 / 950, 980 / 950)
    )


def test_simulated_machines_have_a_history_of_their_own(plan: Plan) -> None:
    """What a scenario made up is never counted into a real load."""
    simulated = msgspec.structs.replace(MACHINE, is_simulated=True)
    assert subject_of(plan, simulated) != subject_of(plan, MACHINE)


async def test_a_rearranged_copy_is_no_error_of_the_weights() -> None:
    """A backend reports the copy among its weights, so an exact plan stays as it was."""
    planned = MemoryTerms(
        weights_bytes=800, repacked_bytes=440, kv_bytes=100, compute_bytes=60, overhead_bytes=40
    )
    footprint = Footprint(
        weights_bytes=1240, mapped_weights_bytes=800, kv_bytes=100, compute_bytes=50,
        output_bytes=10,
    )  # fmt: skip
    terms = measured_terms(planned, footprint)
    assert all(plan == found for plan, found in terms.values())
    past = PastErrors(ratios={term: (found / plan,) for term, (plan, found) in terms.items()})
    assert corrected(planned, past) == planned


def test_what_a_backend_takes_later_is_no_error_of_the_plan() -> None:
    """A backend without KV, and with crumbs of scratch, after loading needs more when it works."""
    planned = MemoryTerms(weights_bytes=100, kv_bytes=50, compute_bytes=30_000, overhead_bytes=9)
    loaded = Footprint(weights_bytes=104, mapped_weights_bytes=0, kv_bytes=0, compute_bytes=214)
    assert measured_terms(planned, loaded) == {"weights_bytes": (100, 104)}
