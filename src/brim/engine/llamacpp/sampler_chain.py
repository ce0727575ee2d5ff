"""Builds llama.cpp's sampler chain for one sequence; every sampler runs in C."""

import ctypes
import math
import secrets
from collections.abc import Iterator
from typing import Any

from brim.core.sampling import SamplingParams
from brim.engine.llamacpp.binding import lib

# 0xFFFFFFFF means "random" to llama.cpp, so seeds are taken modulo that number.
_NUM_SEEDS = 0xFFFFFFFF

_MIN_KEEP = 1
"""Truncation samplers always leave at least the likeliest token."""

SAMPLERS = frozenset(SamplingParams.__struct_fields__)
"""llama.cpp has a sampler for every field."""


_MAX_PROTOTYPES = 8
"""Prepared DRY samplers that are kept; clients mostly use the default breakers."""


_WITH_HISTORY = frozenset({b"penalties", b"dry"})
"""What llama.cpp calls the samplers that look back."""


class ChainBuilder:
    """Makes chains for one loaded model.

    Args:
        vocab: llama.cpp's vocabulary; DRY reads its sequence breakers with it.
        vocab_size: Number of tokens.
        eog_tokens: Forbidden when `ignore_eos` is set.
        window: The context in tokens; no history is longer, and samplers allocate by it.
    """

    def __init__(
        self, vocab: Any, *, vocab_size: int, eog_tokens: frozenset[int], window: int
    ) -> None:
        self._vocab = vocab
        self._vocab_size = vocab_size
        self._eog_tokens = eog_tokens
        self._window = window
        self._dry_prototypes: dict[tuple[object, ...], Any] = {}

    def build(self, params: SamplingParams) -> Any:
        """A chain in the order of SamplingParams, without the links that would do nothing.

        Args:
            params: Already checked by engine.guards.

        Returns:
            A `llama_sampler *` that the caller frees.
        """
        chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        for sampler in self._samplers(params):
            lib.llama_sampler_chain_add(chain, sampler)
        return chain

    def free(self) -> None:
        """Free the prepared samplers; chains that were built live on."""
        for prototype in self._dry_prototypes.values():
            lib.llama_sampler_free(prototype)
        self._dry_prototypes.clear()

    def _samplers(self, params: SamplingParams) -> Iterator[Any]:
        biases = list(params.logit_bias)
        if params.ignore_eos:
            biases += [(token, -math.inf) for token in sorted(self._eog_tokens)]
        if biases:
            array = (lib.llama_logit_bias * len(biases))(*biases)
            yield lib.llama_sampler_init_logit_bias(self._vocab_size, len(biases), array)
        if params.repeat_penalty != 1.0 or params.presence_penalty or params.frequency_penalty:
            yield lib.llama_sampler_init_penalties(
                self._vocab_size,
                min(params.repeat_last_n, self._window),
                params.repeat_penalty,
                params.frequency_penalty,
                params.presence_penalty,
            )
        if params.dry_multiplier:
            yield self._dry(params)
        if params.is_greedy:
            yield lib.llama_sampler_init_greedy()
        else:
            yield from self._random_samplers(params)

    def _random_samplers(self, params: SamplingParams) -> Iterator[Any]:
        seed = params.seed if params.seed is not None else secrets.randbelow(_NUM_SEEDS)
        seed %= _NUM_SEEDS
        if params.top_k > 0:
            yield lib.llama_sampler_init_top_k(min(params.top_k, self._vocab_size))
        if params.typical_p < 1.0:
            yield lib.llama_sampler_init_typical(params.typical_p, _MIN_KEEP)
        if params.top_p < 1.0:
            yield lib.llama_sampler_init_top_p(params.top_p, _MIN_KEEP)
        if params.min_p > 0.0:
            yield lib.llama_sampler_init_min_p(params.min_p, _MIN_KEEP)
        if params.xtc_probability > 0.0:
            yield lib.llama_sampler_init_xtc(
                params.xtc_probability, params.xtc_threshold, _MIN_KEEP, seed
            )
        yield lib.llama_sampler_init_temp(params.temperature)
        yield lib.llama_sampler_init_dist(seed)

    def _dry(self, params: SamplingParams) -> Any:
        """A copy of a prepared DRY sampler.

        Preparing one looks for its breakers in every token: 45 ms for the default four and a
        vocabulary of 152,000, on the thread that everybody's decoding waits for.
        """
        key = (
            params.dry_multiplier,
            params.dry_base,
            params.dry_allowed_length,
            params.dry_penalty_last_n,
            params.dry_sequence_breakers,
        )
        if key not in self._dry_prototypes:
            if len(self._dry_prototypes) == _MAX_PROTOTYPES:
                oldest = next(iter(self._dry_prototypes))
                lib.llama_sampler_free(self._dry_prototypes.pop(oldest))
            breakers = [text.encode("utf-8", "replace") for text in params.dry_sequence_breakers]
            self._dry_prototypes[key] = lib.llama_sampler_init_dry(
                self._vocab,
                params.dry_multiplier,
                params.dry_base,
                params.dry_allowed_length,
                min(params.dry_penalty_last_n, self._window),
                (ctypes.c_char_p * len(breakers))(*breakers),
                len(breakers),
            )
        return lib.llama_sampler_clone(self._dry_prototypes[key])


def forget_history(chain: Any) -> None:
    """Have a chain's penalties forget what they have seen; random states go on as they are."""
    for index in range(lib.llama_sampler_chain_n(chain)):
        sampler = lib.llama_sampler_chain_get(chain, index)
        if lib.llama_sampler_name(sampler) in _WITH_HISTORY:
            lib.llama_sampler_reset(sampler)
