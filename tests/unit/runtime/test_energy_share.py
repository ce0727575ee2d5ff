"""Joules are shared by tokens, and none is counted twice or lost while requests are in work."""

from hypothesis import given, settings
from hypothesis import strategies as st
from support.meters import RecordingMeter

from brim.runtime.energy_share import EnergyShare
from brim.runtime.metering import Metering

APPS = st.sampled_from(["", "mail", "notes"])


@settings(max_examples=30)
@given(
    st.lists(
        st.tuples(st.dictionaries(APPS, st.integers(1, 1000), max_size=3), st.floats(0.0, 1000.0)),
        max_size=8,
    )
)
def test_what_is_shared_adds_up_to_what_was_counted(
    moments: list[tuple[dict[str, int], float]],
) -> None:
    """Also over moments in which no token came: those joules go to the next ones."""
    share, shared_j = EnergyShare(), 0.0
    for tokens, joules in moments:
        for app, number in tokens.items():
            share.note(app, num_completion_tokens=number)
        shared_j += sum(share.split(joules, is_working=True).values())
    share.note("last", num_prompt_tokens=1)
    shared_j += share.split(0.0, is_working=True)["last"]
    assert abs(shared_j - sum(joules for _, joules in moments)) < 1e-6


def test_an_idle_machines_energy_is_nobodys() -> None:
    """What was counted without requests is not charged to the next one."""
    share = EnergyShare()
    assert share.split(100.0, is_working=False) == {}
    share.note("mail", num_completion_tokens=1)
    assert share.split(2.0, is_working=True) == {"mail": 2.0}


def test_a_token_read_costs_a_part_of_one_drawn() -> None:
    """Prompts are read in batches."""
    share = EnergyShare()
    share.note("reads", num_prompt_tokens=4)
    share.note("writes", num_completion_tokens=1)
    assert share.split(2.0, is_working=True) == {"reads": 1.0, "writes": 1.0}


def test_the_meter_is_told_each_apps_joules() -> None:
    """Those of nobody in particular too, which it leaves out of its records."""
    meter = RecordingMeter()
    metering = Metering(meter)
    metering.energy.note("mail", num_completion_tokens=3)
    metering.energy.note("", num_completion_tokens=1)
    metering.note_joules(8.0, is_working=True)
    assert meter.joules == {"mail": 6.0, "": 2.0}
