"""Plans that shrink to the room there is."""

from brim.core.machine import MachineSpec
from brim.core.model import ModelSpec
from brim.planner.fit import LEAST_CONTEXT_TOKENS, Room, fit_plan
from brim.planner.plan import DEFAULT_CONTEXT_TOKENS, make_plan

PLENTY = Room(2**40, 2**40)


def test_plenty_of_room_changes_nothing(llama_1b: ModelSpec, laptop: MachineSpec) -> None:
    """Where everything fits, the plan is the one without any room given."""
    plan = fit_plan(llama_1b, laptop, PLENTY, engine="llamacpp")
    assert plan == make_plan(llama_1b, laptop, engine="llamacpp")


def test_options_give_way_before_the_context(llama_1b: ModelSpec, laptop: MachineSpec) -> None:
    """Short of a second copy of weights, the model keeps its context and loses the copy."""
    wanted = make_plan(llama_1b, laptop, engine="llamacpp")
    assert wanted.memory.repacked_bytes
    room = Room(wanted.memory.total_bytes - 1, wanted.memory.total_bytes - 1)
    plan = fit_plan(llama_1b, laptop, room, engine="llamacpp")
    assert plan.context_tokens == DEFAULT_CONTEXT_TOKENS
    assert plan.memory.total_bytes <= room.comfortable_bytes
    assert not plan.repack_weights
    assert "memory needs it" in plan.reasons["repack_weights"]


def test_an_unasked_context_shrinks_and_says_so(llama_1b: ModelSpec, laptop: MachineSpec) -> None:
    """The longest context that fits comfortably is taken, and the reason names what was wanted."""
    smallest = make_plan(
        llama_1b, laptop, engine="llamacpp", context_tokens=4096, kv_type="q8_0",
        flash_attention=True, free_bytes=1,
    )  # fmt: skip
    lean = smallest.memory.total_bytes - smallest.memory.repacked_bytes
    plan = fit_plan(llama_1b, laptop, Room(lean, lean), engine="llamacpp")
    assert LEAST_CONTEXT_TOKENS <= plan.context_tokens < DEFAULT_CONTEXT_TOKENS
    assert plan.memory.total_bytes <= lean
    assert "longest that fits comfortably" in plan.reasons["context_tokens"]


def test_a_context_that_was_asked_for_is_kept(llama_1b: ModelSpec, laptop: MachineSpec) -> None:
    """A wish is never shortened, so that the account can refuse it with the ways out."""
    plan = fit_plan(llama_1b, laptop, Room(10**9, 10**9), engine="llamacpp", context_tokens=100_000)
    assert plan.context_tokens == 100_000


def test_tight_is_better_than_shorter_than_useful(llama_1b: ModelSpec, laptop: MachineSpec) -> None:
    """Where nothing useful fits comfortably, the tight budget is used before giving up."""
    frugal = make_plan(llama_1b, laptop, engine="llamacpp", kv_type="q8_0", flash_attention=True)
    tight = frugal.memory.total_bytes - frugal.memory.repacked_bytes
    plan = fit_plan(llama_1b, laptop, Room(llama_1b.weights_bytes, tight), engine="llamacpp")
    assert plan.context_tokens == DEFAULT_CONTEXT_TOKENS
    assert llama_1b.weights_bytes < plan.memory.total_bytes <= tight


def test_what_cannot_fit_is_left_as_it_was_wanted(llama_1b: ModelSpec, laptop: MachineSpec) -> None:
    """A model larger than all room is planned as wanted, for the refusal to start from."""
    plan = fit_plan(llama_1b, laptop, Room(1, 1), engine="llamacpp")
    assert plan == make_plan(llama_1b, laptop, engine="llamacpp", free_bytes=1)
