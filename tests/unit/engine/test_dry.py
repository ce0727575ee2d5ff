"""DRY on the host: what it penalises, and where repetitions end."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brim.core.sampling import SamplingParams
from brim.engine.byte_tokenizer import ByteTokenizer
from brim.engine.dry import NO_BREAKERS, Breakers, DryBreakers, dry_penalties

TOKENS = list(b"the cat sat on the mat, the cat sat on the hat")


def dry(**changes: object) -> SamplingParams:
    fields = {"dry_multiplier": 0.8, "dry_base": 1.75, "dry_sequence_breakers": (), **changes}
    return SamplingParams(**fields)  # type: ignore[arg-type]


def by_definition(history: Sequence[int], params: SamplingParams) -> dict[int, float]:
    """Every earlier place is compared with the end, token by token."""
    recent = history[-params.dry_penalty_last_n :]
    longest: dict[int, int] = {}
    for end in range(len(recent) - 1):
        length = 0
        while length <= end and recent[end - length] == recent[-1 - length]:
            length += 1
        follower = recent[end + 1]
        if length >= params.dry_allowed_length:
            longest[follower] = max(length, longest.get(follower, 0))
    return {
        token: params.dry_multiplier * params.dry_base ** (length - params.dry_allowed_length)
        for token, length in longest.items()
    }


@settings(max_examples=80, deadline=None)
@given(
    history=st.lists(st.integers(0, 3), min_size=1, max_size=60),
    allowed=st.integers(0, 5),
    window=st.integers(1, 70),
)
def test_penalties_are_those_of_the_definition(
    history: list[int], allowed: int, window: int
) -> None:
    """The penalty grows with the longest earlier run that the next token would continue."""
    params = dry(dry_allowed_length=allowed, dry_penalty_last_n=window)
    expected = by_definition(history, params)
    assert dry_penalties(history, params, NO_BREAKERS) == pytest.approx(expected)


def breakers_of(*texts: str) -> Breakers:
    """Of the vocabulary whose tokens are bytes."""
    return DryBreakers(ByteTokenizer()).find(dry(dry_sequence_breakers=texts))


def test_a_breaker_ends_what_counts_as_a_repetition() -> None:
    """Only tokens behind the last breaker count as repeated, and a breaker is not penalised."""
    params = dry(dry_allowed_length=1, dry_base=2.0, dry_multiplier=1.0)

    def penalties(text: bytes, breakers: Breakers) -> dict[int, float]:
        return dry_penalties([*text], params, breakers)

    assert penalties(b"abcdabc", NO_BREAKERS) == {ord("d"): 4.0}
    assert penalties(b"a.cda.c", breakers_of(".")) == {ord("d"): 1.0}
    assert penalties(b"ab.dab", breakers_of(".")) == {}


def test_a_breaker_of_several_tokens_must_be_whole() -> None:
    """A head without its tail breaks nothing, and the longest tail that follows counts."""
    breakers = breakers_of("<>", "<>|")
    assert breakers.repeat_limit([*b"a<>|bc"]) == 2
    assert breakers.repeat_limit([*b"a<>bc"]) == 2
    assert breakers.repeat_limit([*b"a<bc"]) == 4
    assert breakers.repeat_limit([*b"ab<"]) == 3


@pytest.mark.parametrize(
    "params",
    [dry(dry_multiplier=0.0), dry(dry_base=0.5), dry(dry_penalty_last_n=0)],
    ids=["multiplier", "base", "window"],
)
def test_values_that_turn_dry_off(params: SamplingParams) -> None:
    """No multiplier, a base below 1 or no window mean no penalty."""
    assert dry_penalties(TOKENS, params, NO_BREAKERS) == {}


def test_nothing_is_repeated_where_nothing_was_fed() -> None:
    """An empty history has no penalties, whatever length is allowed."""
    assert dry_penalties([], dry(dry_allowed_length=0), NO_BREAKERS) == {}


def test_a_penalty_stays_a_float() -> None:
    """A very long repetition, or a huge base, gives the largest float and no error."""
    for params in (dry(dry_base=3e38), dry(dry_base=1e19), dry(dry_multiplier=3e38)):
        (value,) = dry_penalties([7] * 1000, params, NO_BREAKERS).values()
        assert 0 < value <= 3.4028235e38


class Words(ByteTokenizer):
    """A vocabulary in which breakers lie across tokens."""

    pieces = (b"ab", b"b", b"ba", b"xab\ncd", b"a", b"y", b"z", b"", b"aa", b"abc")
    vocab_size = len(pieces)

    def piece(self, token: int, *, special: bool = False) -> bytes:
        return self.pieces[token]

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        return [self.pieces.index(char.encode()) for char in text]


def found(*texts: str) -> dict[int, set[tuple[int, ...]]]:
    breakers = DryBreakers(Words()).find(dry(dry_sequence_breakers=texts))
    tails = {token: set(breakers.tails(token)) for token in range(Words.vocab_size)}
    return {token: of for token, of in tails.items() if of}


def test_breakers_are_found_in_the_pieces() -> None:
    """Tokens that hold a breaker need no tail; those that end with its start need the rest."""
    assert found("\n") == {3: {()}}
    assert found("ab") == {0: {()}, 3: {()}, 9: {()}, 2: {(1,)}, 4: {(1,)}, 8: {(1,)}}
    assert found("aba") == {0: {(4,)}, 2: {(1, 4)}, 4: {(1, 4)}, 8: {(1, 4)}}
    assert found("aab") == {4: {(4, 1)}, 8: {(1,), (4, 1)}, 2: {(4, 1)}}
    assert found("") == {}


def test_only_tokens_that_occur_are_looked_at() -> None:
    """A set of breakers costs no pass over the vocabulary, and each token is read once."""

    class Counting(ByteTokenizer):
        read: list[int] = []  # noqa: RUF012

        def piece(self, token: int, *, special: bool = False) -> bytes:
            self.read.append(token)
            return super().piece(token, special=special)

    breakers = DryBreakers(Counting())
    params = dry(dry_sequence_breakers=("\n",))
    for _ in range(3):
        dry_penalties(TOKENS, params, breakers.find(params))
    assert sorted(Counting.read) == sorted(set(TOKENS))


def test_a_set_of_breakers_is_kept() -> None:
    """The same breakers are prepared once, the eight last sets are kept, and no DRY needs none."""
    breakers = DryBreakers(ByteTokenizer())
    assert breakers.find(dry(dry_multiplier=0.0, dry_sequence_breakers=("ab",))) is NO_BREAKERS
    first = breakers.find(dry(dry_sequence_breakers=("ab",)))
    assert breakers.find(dry(dry_sequence_breakers=("ab",))) is first
    for count in range(9):
        breakers.find(dry(dry_sequence_breakers=("a" * count,)))
    assert breakers.find(dry(dry_sequence_breakers=("ab",))) is not first
