"""Where any conversation is cut, however it grows."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from brim.chat.overflow import Conversation, next_cut, replay_cuts, split_pieces
from brim.core.request import Message

LIMIT, TARGET = 850, 500

exchanges = st.lists(
    st.tuples(
        st.integers(1, 400),  # the user's tokens
        st.lists(st.tuples(st.integers(1, 80), st.integers(1, 80)), max_size=2),  # calls, results
        st.integers(1, 400),  # the answer's
    ),
    min_size=1,
    max_size=30,
)


def conversation(exchanges: list[tuple[int, list[tuple[int, int]], int]]) -> Conversation:
    """With a system prompt; each message's content is its own name."""
    found: list[tuple[str, int]] = [("system", 20)]
    for user, calls, answer in exchanges:
        found.append(("user", user))
        for call, result in calls:
            found += [("assistant", call), ("tool", result)]
        found.append(("assistant", answer))
    messages = tuple(Message(role=role, content=str(n)) for n, (role, _) in enumerate(found))
    return Conversation(messages, tuple(cost for _, cost in found))


def asked(whole: Conversation) -> list[Conversation]:
    """The conversation at each time that the model was asked."""
    return [
        Conversation(whole.messages[:end], whole.costs[:end])
        for end in range(1, len(whole.messages))
        if whole.messages[end].role == "assistant"
    ]


def cuts_of(talk: Conversation) -> list[int]:
    return replay_cuts(talk, fixed_tokens=20, limit_tokens=LIMIT, target_tokens=TARGET)


@given(exchanges)
def test_what_is_kept_fits_or_is_the_newest_exchange(
    exchanges: list[tuple[int, list[tuple[int, int]], int]],
) -> None:
    """And every cut lies before a user's message: what belongs together is not split."""
    for talk in asked(conversation(exchanges)):
        cuts = cuts_of(talk)
        assert all(cut in talk.starts for cut in cuts)
        cut = cuts[-1] if cuts else 1
        is_newest = cut == talk.starts[-1]
        assert 20 + sum(talk.costs[cut:]) <= LIMIT or is_newest


@given(exchanges)
def test_a_cut_is_never_taken_back(
    exchanges: list[tuple[int, list[tuple[int, int]], int]],
) -> None:
    """What was decided when the conversation was shorter is decided again."""
    history: list[int] = []
    for talk in asked(conversation(exchanges)):
        cuts = cuts_of(talk)
        assert cuts[: len(history)] == history
        assert cuts == sorted(set(cuts))
        history = cuts


@given(exchanges)
def test_only_a_prompt_over_the_limit_is_cut_and_then_to_the_target(
    exchanges: list[tuple[int, list[tuple[int, int]], int]],
) -> None:
    """So that the next cut is a third of the window away; only a newest exchange may be longer."""
    before = 1
    for talk in asked(conversation(exchanges)):
        cut = (cuts_of(talk) or [1])[-1]
        if cut != before:
            assert 20 + sum(talk.costs[before:]) > LIMIT
            assert 20 + sum(talk.costs[cut:]) <= TARGET or cut == talk.starts[-1]
        before = cut


@given(exchanges, st.integers(100, 900))
def test_pieces_hold_everything_that_goes_and_fit(
    exchanges: list[tuple[int, list[tuple[int, int]], int]], max_tokens: int
) -> None:
    """Messages in order, none twice; exchanges over the bound come as transcripts of themselves."""
    talk = conversation(exchanges)
    cuts = cuts_of(talk)
    costs = dict(zip(talk.messages, talk.costs, strict=True))
    expected: list[str] = []
    bounds = [start for start in talk.starts if start < (cuts or [1])[-1]] + cuts[-1:]
    for start, end in itertools.pairwise(bounds):
        exchange = talk.messages[start:end]
        if sum(talk.costs[start:end]) <= max_tokens:
            expected += [message.content for message in exchange]
        else:
            expected.append("\n\n".join(f"{m.role}: {m.content}" for m in exchange))
    pieces = split_pieces(talk, cuts, max_tokens, len)
    assert [message.content for piece in pieces for message in piece] == expected
    for piece in pieces:
        assert sum(costs.get(message, 0) for message in piece) <= max_tokens


@given(exchanges, st.integers(1, 5000))
def test_the_next_cut_is_the_nearest_that_is_enough(
    exchanges: list[tuple[int, list[tuple[int, int]], int]], over: int
) -> None:
    """The newest exchange stays whatever is asked for."""
    talk = conversation(exchanges)
    cut = next_cut(talk, 1, over)
    if len(talk.starts) == 1:
        assert cut is None
        return
    assert cut in talk.starts[1:]
    enough = [start for start in talk.starts[1:] if sum(talk.costs[1:start]) >= over]
    assert cut == (enough[0] if enough else talk.starts[-1])
