"""The texts that every server gets: drawn from a seed, sized in tokens by a probe, never repeated.

A text depends on the run's seed, the repetition, the workload and its label, and on nothing else:
all servers of a repetition get the same one, and no two repetitions share more than a few words, so
that nothing is answered from an earlier one's memory.
"""

import random

import msgspec

from brim.bench.workload import sentences

LEAST_WORDS = 2
"""Of any text: an empty prompt is no request."""


class Wording(msgspec.Struct, frozen=True, kw_only=True):
    """How many words make a prompt of so many tokens, for the model at hand."""

    tokens_per_word: float
    overhead_tokens: float
    """Of the chat template around one message."""

    @classmethod
    def fitted(cls, short: tuple[int, int], long: tuple[int, int]) -> "Wording":
        """The line through two probes of (words, prompt tokens).

        Example:
            >>> Wording.fitted((10, 25), (110, 175)).words_for(160)
            100
        """
        per_word = max((long[1] - short[1]) / (long[0] - short[0]), 0.1)
        return cls(
            tokens_per_word=per_word,
            overhead_tokens=max(0.0, short[1] - per_word * short[0]),
        )

    def words_for(self, num_tokens: int) -> int:
        """Words of a message whose prompt has about that many tokens."""
        return max(LEAST_WORDS, round((num_tokens - self.overhead_tokens) / self.tokens_per_word))


class Texts:
    """Gives one turn of one workload its texts."""

    def __init__(self, seed: int, repetition: int, workload: str, wording: Wording) -> None:
        self.salt = f"{seed}/{repetition}/{workload}"
        self._wording = wording

    def text(self, label: str, num_tokens: int) -> str:
        """Sentences of about `num_tokens`, the same for equal labels; longer ones begin alike."""
        return sentences(self.rng(label), self._wording.words_for(num_tokens))

    def tools(self, label: str, num_tokens: int) -> str:
        """A system prompt as agents have it: a list of tools with their descriptions."""
        rng = self.rng(label)
        words_left = self._wording.words_for(num_tokens)
        lines = ["You are an agent. These are your tools:"]
        while words_left > 0:
            words = min(words_left, 30)
            lines.append(f"- tool_{len(lines)}: {sentences(rng, words)}")
            # The name of a tool and its punctuation are worth about four words.
            words_left -= words + 4
        return "\n".join(lines)

    def rng(self, label: str) -> random.Random:
        """Chance that is the same in every run with this seed."""
        return random.Random(f"{self.salt}/{label}")
