"""One engine call: what is fed, and what comes back."""

from collections.abc import Sequence

import msgspec


class Feed(msgspec.Struct, frozen=True):
    """Tokens for one sequence in one step.

    A decoding sequence feeds the one token that was sampled last; a prefilling one feeds a chunk of
    its prompt, and samples with the last chunk only.
    """

    seq_id: int
    tokens: Sequence[int]
    sample: bool = True
    """Draw a token from the distribution after the last fed token."""
    mask: bytes | None = None
    """Allowed tokens as a little-endian bit set of ceil(vocab_size / 8) bytes; None allows all."""


class StepPlan(msgspec.Struct, frozen=True):
    """Everything that goes through the model in one call; each sequence at most once."""

    feeds: Sequence[Feed]

    @property
    def num_scheduled_tokens(self) -> int:
        """Rows of this step over all sequences."""
        return sum(len(feed.tokens) for feed in self.feeds)


class Sampled(msgspec.Struct, frozen=True):
    """The token drawn for one sequence."""

    seq_id: int
    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    """(token id, logprob), likeliest first, as many as were asked for."""


class StepResult(msgspec.Struct, frozen=True):
    """One entry for each feed with `sample`, in the order of the feeds."""

    sampled: Sequence[Sampled]
