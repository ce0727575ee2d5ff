"""How the next token is chosen: one frozen value per request."""

import msgspec

MAX_SEED = 2**32 - 2
"""llama.cpp's seeds are 32 bits wide, and the last value means "draw one"."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Sampling settings of one sequence; names and meanings are llama-server's.

    The order in which they act is part of the engine contract: logit bias and token mask,
    penalties, DRY, top-k, typical, top-p, min-p, XTC, temperature, draw.
    `temperature` 0 means greedy and makes everything after the penalties irrelevant.

    Defaults are llama-server's.  A top-k of 40 also keeps the chain cheap: without it every token
    sorts the whole vocabulary.
    """

    temperature: float = 0.8
    top_k: int = 40
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repeat_last_n: int = 64
    """How many recent tokens the three penalties look at, the prompt's included."""
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = 1024
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, added logit) pairs; -inf forbids a token."""
    seed: int | None = None
    """0 to MAX_SEED; None draws a fresh seed; the one used is reported with the answer."""
    num_logprobs: int | None = None
    """None: no logprobs.  0: of the chosen token.  n: of the n likeliest as well.

    Logprobs are of the distribution after bias and mask, before penalties, temperature and
    truncation: what the model said, not what the sampler made of it.
    """
    ignore_eos: bool = False
    """Forbid every end-of-generation token, so that only max_tokens or a stop string ends it."""

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken.

        Below a millionth the distribution is a single token, and dividing by it overflows.
        """
        return self.temperature < 1e-6

    @property
    def needs_history(self) -> bool:
        """Whether earlier tokens change the distribution (penalties or DRY)."""
        return (
            self.repeat_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.dry_multiplier != 0.0
        )
