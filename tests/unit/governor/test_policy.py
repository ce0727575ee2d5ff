"""What the governor decides, look by look."""

from support.looks import Looks, kinds, loaded

from brim.core.machine import Pressure, ThermalState
from brim.core.stance import PowerMode, Stance
from brim.governor.actions import ActionKind
from brim.governor.policy import DROP_AGAIN_S, GROW_AFTER_S, LOADS_AFTER_S
from brim.governor.readings import ModelReading

NORMAL, WARNING, CRITICAL = Pressure
SET, GROW = (ActionKind.SET_STANCE, ""), ActionKind.GROW_KV
DROP, UNLOAD, LEAVING = ActionKind.DROP_IDLE_KV, ActionKind.UNLOAD, ActionKind.ANNOUNCE_LEAVING


def calm(
    looks: Looks, *models: ModelReading, since_s: float, until_s: float
) -> list[tuple[ActionKind, str]]:
    """Looks once a second at a machine that is well; everything that was decided."""
    found: list[tuple[ActionKind, str]] = []
    at_s = since_s
    while at_s <= until_s:
        found += kinds(looks.at(at_s, *models, pressure=NORMAL))
        at_s += 1
    return found


def test_a_warning_costs_idle_kv_and_no_model(looks: Looks) -> None:
    """Every pool that is larger than what runs shrinks; work gets smaller; nothing is unloaded."""
    busy = loaded("busy", num_in_flight=1, idle_s=0.0, kv_needed_tokens=1000)
    full = loaded("full", num_in_flight=2, idle_s=0.0, kv_needed_tokens=4000)
    actions = looks.at(0, loaded("idle"), busy, full, pressure=WARNING)
    assert kinds(actions) == [SET, (DROP, "idle"), (DROP, "busy")]
    stance = looks.state.stance
    assert stance.admits
    assert not stance.loads
    assert stance.work.stall_fraction < 1
    assert stance.work.runs_background
    assert stance.max_background_answer_tokens is not None
    assert stance.max_answer_tokens is None
    assert stance.reason == "memory is getting short: the system reports warning pressure"


def test_idle_kv_goes_once_an_episode_and_again_when_it_grew_back(looks: Looks) -> None:
    """What a pool could not do without is left alone; an eighth of the plan more goes again."""
    looks.at(0, loaded(), pressure=WARNING)
    small = loaded(kv_pool_tokens=256)
    for at_s in range(1, 60):
        assert DROP not in [kind for kind, _ in kinds(looks.at(at_s, small, pressure=WARNING))]
    regrown = loaded(kv_pool_tokens=256 + 4096 // 8, idle_s=20.0)
    assert kinds(looks.at(60, regrown, pressure=WARNING)) == [(DROP, "chat")]


def test_a_pool_that_a_conversation_made_grow_is_left_alone_for_a_while(looks: Looks) -> None:
    """Once more a minute at a warning while it is used; at critical as soon as it may."""
    looks.at(0, loaded(), pressure=WARNING)
    looks.at(1, loaded(kv_pool_tokens=256), pressure=WARNING)
    used = loaded(kv_pool_tokens=2000, idle_s=19.0)
    times = [at_s for at_s in range(2, 75) if kinds(looks.at(at_s, used, pressure=WARNING))]
    # The stance at 30: loads are the account's business again.
    assert times == [30, 70]
    looks.at(76, loaded(kv_pool_tokens=256), pressure=WARNING)
    busy = loaded(kv_pool_tokens=2000, idle_s=0.0, num_in_flight=1, kv_needed_tokens=300)
    assert (DROP, "chat") in kinds(looks.at(81, busy, pressure=CRITICAL))


def test_a_pool_that_does_not_shrink_is_tried_later_and_later(looks: Looks) -> None:
    """Attempts in vain come after 10, 20, 40 seconds and so on, never in a row."""
    times = [
        at_s
        for at_s in range(200)
        if (DROP, "chat") in kinds(looks.at(at_s, loaded(), pressure=WARNING))
    ]
    assert times == [0, DROP_AGAIN_S, 3 * DROP_AGAIN_S, 7 * DROP_AGAIN_S, 15 * DROP_AGAIN_S]


def test_a_model_whose_idle_time_ends_with_a_warning_gets_one_action(looks: Looks) -> None:
    """It leaves, and its pool is not made smaller besides: two actions on it would collide."""
    ends = loaded(idle_s=180.0, idle_unload_s=180.0)
    assert kinds(looks.at(0, ends, pressure=WARNING)) == [SET, (UNLOAD, "chat")]


def test_a_model_that_leaves_as_pools_grow_back_gets_one_action(looks: Looks) -> None:
    """Its idle time is shorter than the time in which a used pool grows back."""
    looks.at(0, pressure=NORMAL)
    small = loaded(kv_pool_tokens=256, idle_s=50.0, idle_unload_s=50.0)
    found = kinds(looks.at(GROW_AFTER_S, small, pressure=NORMAL))
    assert [kind for kind, _ in found if kind in (GROW, UNLOAD)] == [UNLOAD]


def test_models_that_cannot_resize_or_are_being_changed_are_left_alone(looks: Looks) -> None:
    """No pool is made anew that cannot be, or while something is done to its model."""
    models = (
        loaded("fixed", can_resize_kv=False),
        loaded("changing", is_changing=True),
        loaded("loading", is_loading=True),
    )
    assert kinds(looks.at(0, *models, pressure=WARNING)) == [SET]


def test_loads_are_decided_by_the_account_again_when_a_warning_stays(looks: Looks) -> None:
    """After half a minute of the same warning loads are allowed; at critical they never are."""
    allowed = []
    for at_s, pressure in (
        (0, WARNING), (LOADS_AFTER_S - 1, WARNING), (LOADS_AFTER_S, WARNING),
        (LOADS_AFTER_S + 1, CRITICAL), (3 * LOADS_AFTER_S, CRITICAL),
    ):  # fmt: skip
        actions = looks.at(at_s, pressure=pressure)
        stance = looks.state.stance
        allowed.append((stance.loads, stance.admits))
        if at_s == LOADS_AFTER_S:
            assert kinds(actions) == [SET]
            assert "the account decides" in actions[0].cause
    assert allowed == [(False, True), (False, True), (True, True), (False, False), (False, False)]


def test_critical_unloads_idle_models_at_once_and_the_busy_when_they_end(looks: Looks) -> None:
    """The least recently used goes first; what has something in flight stays until it has not."""
    busy = loaded("busy", num_in_flight=1, idle_s=0.0, kv_needed_tokens=100)
    old, new = loaded("old", idle_s=90.0), loaded("new", idle_s=3.0)
    actions = looks.at(0, busy, new, old, pressure=CRITICAL)
    assert kinds(actions) == [SET, (UNLOAD, "old"), (UNLOAD, "new"), (DROP, "busy")]
    assert not looks.state.stance.admits
    assert not looks.state.stance.work.runs_background
    assert kinds(looks.at(1, busy, pressure=CRITICAL)) == []
    ended = loaded("busy", idle_s=0.2, kv_pool_tokens=100)
    assert kinds(looks.at(2, ended, pressure=CRITICAL)) == [(UNLOAD, "busy")]


def test_models_that_somebody_waits_for_or_loads_stay(looks: Looks) -> None:
    """Neither pressure nor idleness unloads a model with waiting requests or one being loaded."""
    waited = loaded("waited", num_waiting=1, idle_s=999.0, idle_unload_s=10.0)
    loading = loaded("loading", is_loading=True, idle_s=999.0, idle_unload_s=10.0)
    for at_s, pressure in ((0, CRITICAL), (1, CRITICAL), (30, NORMAL)):
        actions = looks.at(at_s, waited, loading, pressure=pressure)
        assert UNLOAD not in [action.kind for action in actions]


def test_pinned_models_go_last_and_only_at_critical(looks: Looks) -> None:
    """Warning and idleness leave them; at critical they go when the others have, one at a look."""
    pinned = [
        loaded(name, is_pinned=True, idle_s=idle_s, idle_unload_s=10.0, can_resize_kv=False)
        for name, idle_s in (("a", 500.0), ("b", 900.0))
    ]
    free = loaded("free", can_resize_kv=False)
    assert kinds(looks.at(0, *pinned, pressure=WARNING)) == [SET]
    assert kinds(looks.at(1, *pinned, free, pressure=CRITICAL)) == [SET, (UNLOAD, "free")]
    assert kinds(looks.at(2, *pinned, pressure=CRITICAL)) == []
    assert kinds(looks.at(3, *pinned, pressure=CRITICAL)) == [(UNLOAD, "b")]
    assert kinds(looks.at(4, pinned[0], pressure=CRITICAL)) == [(UNLOAD, "a")]


def test_an_unload_in_vain_is_tried_later_and_later(looks: Looks) -> None:
    """A model that is still there is unloaded again after 2, 4, 8 seconds and so on."""
    stuck = loaded(can_resize_kv=False)
    times = [
        at_s
        for at_s in range(70)
        if (UNLOAD, "chat") in kinds(looks.at(at_s, stuck, pressure=CRITICAL))
    ]
    assert times == [0, 2, 6, 14, 30, 62]


def test_pools_grow_back_where_they_are_used_after_a_steady_time(looks: Looks) -> None:
    """Not before half a minute of normal, one at a look, and only what somebody uses."""
    used, unused = loaded("used", kv_pool_tokens=300), loaded("unused", kv_pool_tokens=300)
    unused_now = loaded("unused", kv_pool_tokens=300, idle_s=300.0)
    also = loaded("also", kv_pool_tokens=300)
    looks.at(0, used, unused, also, pressure=WARNING)
    # Normal from second 1 on is the level from second 11 on.
    assert calm(looks, used, unused_now, also, since_s=1, until_s=10 + GROW_AFTER_S) == [SET]
    assert kinds(looks.at(11 + GROW_AFTER_S, used, unused_now, also, pressure=NORMAL)) == [
        (GROW, "used")
    ]
    grown = loaded("used")
    assert kinds(looks.at(12 + GROW_AFTER_S, grown, unused_now, also, pressure=NORMAL)) == [
        (GROW, "also")
    ]


def test_pools_grow_one_after_the_other(looks: Looks) -> None:
    """Not while another model is being changed, not within a second, and not while one loads."""
    looks.at(0, pressure=NORMAL)
    small = [loaded(name, kv_pool_tokens=300) for name in "ab"]
    changing = loaded("c", is_changing=True)
    loading = loaded("d", kv_pool_tokens=300, is_loading=True)
    assert kinds(looks.at(60, *small, changing, pressure=NORMAL)) == []
    assert kinds(looks.at(61, loading, *small, pressure=NORMAL)) == [(GROW, "a")]
    assert kinds(looks.at(61.5, *small, pressure=NORMAL)) == []
    assert kinds(looks.at(62, *small, pressure=NORMAL)) == [(GROW, "b")]


def test_a_pool_that_does_not_grow_is_tried_later(looks: Looks) -> None:
    """Where there is no room for it, it is asked for again after half a minute, then a minute."""
    small = loaded(kv_pool_tokens=300)
    times = [
        at_s
        for at_s in range(100)
        if (GROW, "chat") in kinds(looks.at(at_s, small, pressure=NORMAL))
    ]
    assert times == [0, 30, 90]


def test_growth_that_brought_pressure_back_waits_longer(looks: Looks) -> None:
    """Twice as long after each time, so that shrinking and growing do not chase each other."""
    small, grown = loaded(kv_pool_tokens=256), loaded()
    waits, at_s = [], 0.0
    looks.at(at_s, grown, pressure=WARNING)
    for _ in range(3):
        normal_s = None
        for second in range(1, 400):
            decided = kinds(looks.at(at_s + second, small, pressure=NORMAL))
            if SET in decided:
                normal_s = second
            if (GROW, "chat") in decided:
                break
        assert normal_s is not None
        waits.append(second - normal_s)
        at_s += second + 5
        assert (DROP, "chat") in kinds(looks.at(at_s, grown, pressure=WARNING))
    assert waits == [GROW_AFTER_S, 2 * GROW_AFTER_S, 4 * GROW_AFTER_S]


def test_an_idle_model_is_announced_and_then_leaves(looks: Looks) -> None:
    """Announced once, half a minute before; a request in between takes that back."""

    def at(at_s: float, seconds: float) -> list[tuple[ActionKind, str]]:
        return kinds(looks.at(at_s, loaded(idle_s=seconds, idle_unload_s=180.0), pressure=NORMAL))

    assert at(0, 149.0) == []
    assert at(1, 150.0) == [(LEAVING, "chat")]
    assert at(2, 151.0) == []
    assert at(3, 0.0) == []
    assert at(153, 150.0) == [(LEAVING, "chat")]
    assert at(183, 180.0) == [(UNLOAD, "chat")]


def test_idle_models_leave_one_at_a_look(looks: Looks) -> None:
    """The first may be enough for whatever else needs memory."""
    models = [loaded(name, idle_s=300.0 + n, idle_unload_s=180.0) for n, name in enumerate("ab")]
    first = kinds(looks.at(0, *models, pressure=NORMAL))
    assert [each for each in first if each[0] is UNLOAD] == [(UNLOAD, "b")]
    second = kinds(looks.at(0.5, models[0], pressure=NORMAL))
    assert [each for each in second if each[0] is UNLOAD] == []
    third = kinds(looks.at(1.0, models[0], pressure=NORMAL))
    assert [each for each in third if each[0] is UNLOAD] == [(UNLOAD, "a")]


def test_a_model_without_idle_time_stays(looks: Looks) -> None:
    """None is for ever."""
    assert kinds(looks.at(0, loaded(idle_s=1e6), pressure=NORMAL)) == []


def test_heat_slows_work_and_holds_background(looks: Looks) -> None:
    """Heavy heat paces; trapping heat leaves one sequence, mostly resting; requests are taken."""
    looks.at(0, thermal=ThermalState.HEAVY)
    saving = looks.state.stance
    assert saving.power is PowerMode.SAVING
    assert saving.admits
    assert saving.loads
    assert saving.prefers_draft
    assert not saving.work.runs_background
    assert not saving.work.is_urgent
    looks.at(1, thermal=ThermalState.TRAPPING)
    hot = looks.state.stance
    assert hot.work.pace_fraction < saving.work.pace_fraction < 1
    assert hot.context_fraction < saving.context_fraction < 1
    assert hot.work.max_running == 1
    assert hot.reason == "the machine is hot: the machine's heat is trapping"


def test_battery_only_bounds_background(looks: Looks) -> None:
    """Somebody who works on battery is answered as ever."""
    looks.at(0, is_on_battery=True)
    stance = looks.state.stance
    assert stance.max_background_answer_tokens is not None
    assert (stance.max_answer_tokens, stance.context_fraction) == (None, 1.0)
    assert stance.work == Stance().work


def test_memory_and_power_together_allow_the_less(looks: Looks) -> None:
    """Each limit is the stricter of both, and both reasons are given."""
    looks.at(0, pressure=CRITICAL, thermal=ThermalState.HEAVY)
    stance = looks.state.stance
    assert not stance.admits
    assert stance.work.stall_fraction == 0.25
    assert stance.work.pace_fraction == 0.75
    assert "memory is short" in stance.reason
    assert "power is being saved" in stance.reason


def test_the_stance_changes_with_levels_and_not_with_figures(looks: Looks) -> None:
    """A figure that wavers within a level says nothing new."""
    assert kinds(looks.at(0, stalled_percent=12.0)) == [SET]
    for at_s in range(1, 20):
        assert kinds(looks.at(at_s, stalled_percent=12.0 + at_s % 3)) == []


def test_everything_is_allowed_again_in_the_end(looks: Looks) -> None:
    """After the worst, normal readings lead back to where it began."""
    looks.at(0, pressure=CRITICAL, thermal=ThermalState.TRAPPING)
    for at_s in range(1, 40):
        looks.at(at_s, pressure=NORMAL, thermal=ThermalState.NOMINAL)
    assert looks.state.stance == Stance()
