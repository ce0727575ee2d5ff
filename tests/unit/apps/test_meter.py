"""Budgets, limits and shares: what an app may still do, to the token."""

import pytest
from support.app_desk import Desk

from brim.core.app import App, Budgets, KvQuality, Limits
from brim.core.event import EventKind
from brim.errors import (
    ContextOverflow,
    InvalidRequest,
    OverBudget,
    RateLimited,
    Unauthenticated,
    Unsupported,
)

A_BUDGET = App(name="a", budgets=Budgets(tokens=1000))

HALF_A_DAY_S = 43_200.0


def granted(desk: Desk, app: App) -> None:
    desk.apps[app.name] = app


def test_nobody_in_particular_has_no_bounds_and_no_record(desk: Desk) -> None:
    """Whatever is done without an app leaves nothing."""
    meter = desk.meter
    meter.enter("")
    assert meter.answer_bound("", num_prompt_tokens=9, num_choices=1, max_tokens=7) == 7
    meter.check_share("", model="m", kv_tokens=10**9, pool_tokens=1)
    meter.begin("", "r", model="m", num_prompt_tokens=1, max_completion_tokens=1, kv_tokens=1)
    meter.end("", "r", num_completion_tokens=1)
    meter.note_written("", 5)
    meter.note_energy("", 5.0)
    meter.leave("")
    desk.store.flush()
    assert meter.keeps_on_disk("")
    assert meter.left("").used_tokens == 0
    assert desk.store.spent("", "2027-01-15").num_requests == 0


def test_an_answer_is_cut_to_what_is_left(desk: Desk) -> None:
    """Of each choice, after the prompt and after what others may still use."""
    granted(desk, A_BUDGET)
    assert desk.bound(100, 50) == 50
    assert desk.bound(100, 5000) == 900
    assert desk.bound(100, 5000, num_choices=4) == 225
    desk.run("r", 100, 500)
    assert desk.bound(100, 5000) == 300
    desk.meter.end("a", "r", num_completion_tokens=20)
    assert desk.bound(100, 5000) == 780


def test_a_budget_is_used_to_the_last_token(desk: Desk) -> None:
    """The last request takes what is left; then each is refused, until midnight, in UTC."""
    granted(desk, A_BUDGET)
    desk.run("r", 100, 800)
    desk.meter.end("a", "r", num_completion_tokens=800)
    bound = desk.bound(60, 5000)
    assert bound == 40
    desk.run("s", 60, bound)
    desk.meter.end("a", "s", num_completion_tokens=bound)
    assert desk.meter.left("a").left_tokens == 0
    with pytest.raises(OverBudget, match="has used 1,000 of its 1,000 tokens of today") as caught:
        desk.meter.enter("a")
    assert caught.value.retry_after_s == HALF_A_DAY_S
    assert "renews at 00:00 UTC, in 12 h 0 min" in caught.value.message
    desk.after(HALF_A_DAY_S - 0.5)
    with pytest.raises(OverBudget):
        desk.meter.enter("a")
    desk.after(0.5)
    desk.meter.enter("a")
    assert desk.bound(100, 5000) == 900


def test_a_prompt_longer_than_the_rest_is_refused_with_the_numbers(desk: Desk) -> None:
    """Also where the prompt alone would fit, and no token of an answer."""
    granted(desk, A_BUDGET)
    desk.run("r", 100, 800)
    desk.meter.end("a", "r", num_completion_tokens=800)
    assert desk.bound(99, 10) == 1
    for num_prompt, num_choices, needed in ((100, 1, 101), (98, 3, 101), (10**9, 1, 10**9 + 1)):
        with pytest.raises(OverBudget, match=f"this request needs {needed:,};"):
            desk.bound(num_prompt, 10, num_choices=num_choices)


def test_what_is_only_promised_comes_back_soon(desk: Desk) -> None:
    """Where requests in work hold the rest, the refusal is for seconds and not for the day."""
    granted(desk, A_BUDGET)
    desk.run("r", 100, 890)
    with pytest.raises(RateLimited, match=r"1,000 tokens left .* 990 are promised") as caught:
        desk.bound(100, 10)
    assert caught.value.retry_after_s is not None
    assert caught.value.retry_after_s <= 60
    desk.meter.end("a", "r", num_completion_tokens=0)
    assert desk.bound(100, 10) == 10


def test_begin_is_refused_where_others_were_faster(desk: Desk) -> None:
    """A bound that was right a moment ago does not let two requests over the budget."""
    granted(desk, A_BUDGET)
    bounds = [desk.bound(100, 5000), desk.bound(100, 5000)]
    desk.run("r", 100, bounds[0])
    with pytest.raises(RateLimited):
        desk.run("s", 100, bounds[1])
    assert desk.meter.left("a").reserved_tokens == 1000
    desk.meter.end("a", "s", num_completion_tokens=900)
    assert desk.meter.left("a").reserved_tokens == 1000


def test_an_end_counts_once(desk: Desk) -> None:
    """A second end, and one of a request that never began, are nothing."""
    granted(desk, A_BUDGET)
    desk.run("r", 100, 50)
    for _ in range(3):
        desk.meter.end("a", "r", num_completion_tokens=20)
    desk.meter.end("a", "other", num_completion_tokens=20)
    left = desk.meter.left("a")
    assert (left.used_tokens, left.reserved_tokens, left.left_tokens) == (120, 0, 880)


def test_a_prompt_that_was_not_read_is_not_counted(desk: Desk) -> None:
    """A request that ended in the queue used nothing; one whose prompt was cached, all of it."""
    granted(desk, A_BUDGET)
    desk.run("r", 100, 50)
    desk.meter.end("a", "r", num_completion_tokens=0, num_prompt_tokens=0)
    desk.run("s", 100, 50)
    desk.meter.end("a", "s", num_completion_tokens=5, num_cached_tokens=90)
    assert desk.meter.left("a").used_tokens == 105
    desk.store.flush()
    spent = desk.store.spent("a", "2027-01-15")
    assert (spent.num_requests, spent.num_cached_tokens) == (2, 90)


def test_budgets_hold_over_restarts(desk: Desk) -> None:
    """What was used is used, and what a crash cut counts with its bound."""
    granted(desk, A_BUDGET)
    desk.run("r", 100, 50)
    desk.meter.end("a", "r", num_completion_tokens=20)
    desk.run("s", 100, 300)
    desk.start_again()
    left = desk.meter.left("a")
    assert (left.used_tokens, left.reserved_tokens, left.left_tokens) == (520, 0, 480)
    desk.meter.end("a", "s", num_completion_tokens=1)
    assert desk.meter.left("a").used_tokens == 520


def test_a_request_belongs_to_the_day_of_its_begin(desk: Desk) -> None:
    """One that runs past midnight costs the new day nothing."""
    granted(desk, A_BUDGET)
    desk.run("r", 100, 900)
    desk.after(HALF_A_DAY_S)
    assert desk.bound(100, 5000) == 900
    desk.meter.end("a", "r", num_completion_tokens=900)
    left = desk.meter.left("a")
    assert (left.day, left.used_tokens) == ("2027-01-16", 0)
    desk.store.flush()
    assert desk.store.spent("a", "2027-01-15").num_tokens == 1000


def test_a_clock_that_is_set_back_gives_no_second_budget(desk: Desk) -> None:
    """The day before is still what it was, whether or not the file has all of it yet."""
    granted(desk, A_BUDGET)
    desk.run("r", 100, 900)
    desk.meter.end("a", "r", num_completion_tokens=900)
    desk.after(HALF_A_DAY_S)
    assert desk.meter.left("a").left_tokens == 1000
    desk.after(-HALF_A_DAY_S)
    assert desk.meter.left("a").left_tokens == 0


def test_a_changed_manifest_counts_at_once(desk: Desk) -> None:
    """A larger budget lets the app go on; a smaller one stops it; none bounds nothing."""
    granted(desk, A_BUDGET)
    desk.run("r", 100, 900)
    desk.meter.end("a", "r", num_completion_tokens=900)
    granted(desk, App(name="a", budgets=Budgets(tokens=1500)))
    assert desk.bound(100, 5000) == 400
    granted(desk, App(name="a", budgets=Budgets(tokens=500)))
    with pytest.raises(OverBudget, match="used 1,000 of its 500 tokens"):
        desk.meter.enter("a")
    assert desk.meter.left("a").left_tokens == 0
    granted(desk, App(name="a"))
    assert desk.bound(100, 5000) == 5000


def test_a_removed_app_is_turned_away_and_its_answers_end(desk: Desk) -> None:
    """What runs when an app is removed is still counted."""
    granted(desk, A_BUDGET)
    desk.meter.enter("a")
    desk.run("r", 100, 50)
    del desk.apps["a"]
    with pytest.raises(Unauthenticated, match="'a' was removed"):
        desk.meter.enter("a")
    desk.meter.end("a", "r", num_completion_tokens=20)
    desk.meter.leave("a")
    granted(desk, A_BUDGET)
    assert desk.meter.left("a").used_tokens == 120
    assert desk.meter.left("a").num_in_flight == 0


def test_so_many_at_once(desk: Desk) -> None:
    """One more than may be in work is refused until one of them leaves."""
    granted(desk, App(name="a", limits=Limits(max_concurrent=2)))
    desk.meter.enter("a")
    desk.meter.enter("a")
    with pytest.raises(RateLimited, match="has 2 requests in work and may have 2") as caught:
        desk.meter.enter("a")
    assert caught.value.retry_after_s
    desk.meter.leave("a")
    desk.meter.enter("a")
    assert desk.meter.left("a").num_in_flight == 2


def test_so_many_in_any_minute(desk: Desk) -> None:
    """The minute slides: room comes when the oldest of the last ones is a minute old."""
    granted(desk, App(name="a", limits=Limits(requests_per_minute=2)))
    for wait_s in (0, 50):
        desk.after(wait_s)
        desk.meter.enter("a")
        desk.meter.leave("a")
    with pytest.raises(RateLimited, match="sent 2 requests in the last minute") as caught:
        desk.meter.enter("a")
    assert caught.value.retry_after_s == 10
    desk.after(10)
    desk.meter.enter("a")
    with pytest.raises(RateLimited) as caught:
        desk.meter.enter("a")
    assert caught.value.retry_after_s == 50
    granted(desk, App(name="a", limits=Limits(requests_per_minute=1)))
    desk.after(49)
    with pytest.raises(RateLimited) as caught:
        desk.meter.enter("a")
    assert caught.value.retry_after_s == 11


def test_refused_requests_do_not_push_the_minute(desk: Desk) -> None:
    """A client that asks all the time is let in as often as one that waits."""
    granted(desk, App(name="a", limits=Limits(requests_per_minute=1)))
    num_entered = 0
    for _ in range(180):
        desk.after(1)
        try:
            desk.meter.enter("a")
        except RateLimited:
            continue
        num_entered += 1
    assert num_entered == 3


def test_a_share_of_each_pool(desk: Desk) -> None:
    """Running requests of one model may hold a part of its pool; other models are their own."""
    granted(desk, App(name="a", limits=Limits(memory_share=0.25)))
    check = desk.meter.check_share
    check("a", model="m", kv_tokens=1000, pool_tokens=4000)
    with pytest.raises(InvalidRequest, match=r"needs 1001 tokens .* 25% .*'m', 1000 tokens"):
        check("a", model="m", kv_tokens=1001, pool_tokens=4000)
    desk.run("r", 500, 100)
    check("a", model="m", kv_tokens=400, pool_tokens=4000)
    check("a", model="n", kv_tokens=1000, pool_tokens=4000)
    with pytest.raises(RateLimited, match="hold 600; this one needs 401"):
        check("a", model="m", kv_tokens=401, pool_tokens=4000)
    desk.meter.end("a", "r", num_completion_tokens=1)
    check("a", model="m", kv_tokens=401, pool_tokens=4000)


def test_the_context_of_the_manifest_bounds_prompt_and_answer(desk: Desk) -> None:
    """Whatever the model's window is."""
    granted(desk, App(name="a", max_context_tokens=300))
    assert desk.bound(100, 5000) == 200
    with pytest.raises(ContextOverflow, match="context of 300; shorten it by 1"):
        desk.bound(300, 10)


def test_kv_below_the_apps_quality_is_refused(desk: Desk) -> None:
    """With both types where they differ; an app that says nothing takes any."""
    granted(desk, App(name="a", kv_quality=KvQuality.F16))
    check = desk.meter.check_kv_quality
    check("a", model="m", kv_type_k="f16", kv_type_v="bf16")
    with pytest.raises(Unsupported, match="of f16 or better, and 'm' keeps its as f16/q8_0"):
        check("a", model="m", kv_type_k="f16", kv_type_v="q8_0")
    granted(desk, App(name="a"))
    check("a", model="m", kv_type_k="q4_0", kv_type_v="q4_0")


def test_energy_stops_the_app_that_used_it(desk: Desk) -> None:
    """The request that crosses the bound is the last one of the day."""
    granted(desk, App(name="a", budgets=Budgets(energy_j=3600.0)))
    desk.meter.note_energy("a", 3599.0)
    desk.meter.enter("a")
    desk.meter.note_energy("a", 2.0)
    with pytest.raises(OverBudget, match=r"used 1\.00 of its 1\.00 Wh of today"):
        desk.meter.enter("a")
    assert desk.meter.left("a").left_energy_j == 0
    desk.start_again()
    assert desk.meter.left("a").used_energy_j == 3601.0
    desk.after(HALF_A_DAY_S)
    desk.meter.enter("a")


def test_writes_over_the_budget_stay_in_memory(desk: Desk) -> None:
    """Nothing is refused for them; a budget of 0 keeps nothing on disk from the start."""
    granted(desk, App(name="a", budgets=Budgets(ssd_write_bytes=10)))
    assert desk.meter.keeps_on_disk("a")
    desk.meter.note_written("a", 10)
    assert not desk.meter.keeps_on_disk("a")
    desk.meter.enter("a")
    desk.start_again()
    assert not desk.meter.keeps_on_disk("a")
    desk.after(HALF_A_DAY_S)
    assert desk.meter.keeps_on_disk("a")
    granted(desk, App(name="a", budgets=Budgets(ssd_write_bytes=0)))
    assert not desk.meter.keeps_on_disk("a")


def test_the_app_is_told_once_when_a_budget_gets_tight_and_when_it_is_used_up(desk: Desk) -> None:
    """At 80 % and at the end, with the figures, each once a day, restarts included."""
    granted(desk, A_BUDGET)
    for i, tokens in enumerate((799, 1, 100, 100)):
        desk.run(f"r{i}", 0, tokens)
        desk.meter.end("a", f"r{i}", num_completion_tokens=tokens)
        if i == 1:
            desk.start_again()
    kinds = [event.kind for event in desk.events]
    assert kinds == [EventKind.BUDGET_TIGHTENING, EventKind.BUDGET_EXHAUSTED]
    first, last = desk.events
    assert (first.app, first.cause) == ("a", "it has used 800 of its 1,000 tokens of today")
    assert last.detail == {
        "budget": "tokens", "used": 1000, "limit": 1000, "renews_in_s": HALF_A_DAY_S,
    }  # fmt: skip
    desk.start_again()
    with pytest.raises(OverBudget):
        desk.meter.enter("a")
    assert len(desk.events) == 2
    desk.after(HALF_A_DAY_S)
    desk.run("s", 900, 100)
    desk.meter.end("a", "s", num_completion_tokens=100)
    assert [event.kind for event in desk.events[2:]] == [EventKind.BUDGET_EXHAUSTED]


def test_each_budget_has_its_own_news(desk: Desk) -> None:
    """Energy and writes are told in their own units."""
    budgets = Budgets(tokens=10, energy_j=100.0, ssd_write_bytes=1000)
    granted(desk, App(name="a", budgets=budgets))
    desk.meter.note_energy("a", 85.0)
    desk.meter.note_written("a", 1000)
    assert [(event.detail["budget"], event.kind) for event in desk.events] == [
        ("energy_j", EventKind.BUDGET_TIGHTENING),
        ("ssd_write_bytes", EventKind.BUDGET_EXHAUSTED),
    ]


def test_refusals_are_counted(desk: Desk) -> None:
    """Whatever refuses a request of the app."""
    granted(desk, App(name="a", budgets=Budgets(tokens=10), limits=Limits(max_concurrent=1)))
    desk.meter.enter("a")
    with pytest.raises(RateLimited):
        desk.meter.enter("a")
    with pytest.raises(OverBudget):
        desk.bound(10, 1)
    desk.store.flush()
    assert desk.store.spent("a", "2027-01-15").num_refused == 2
