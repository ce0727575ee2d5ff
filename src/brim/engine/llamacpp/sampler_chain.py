"""Builds llama.cpp's sampler chain for one sequence; every sampler runs in C."""

import ctypes
import secrets
from typing import Any

from brim.core.sampling import SamplingParams
from brim.engine.llamacpp.binding import lib

# 0xFFFFFFFF means "random" to llama.cpp, so seeds are taken modulo that number.
_NUM_SEEDS = 0xFFFFFFFF

_MIN_KEEP = 1
"""Truncation samplers always leave at least the likeliest token."""

SAMPLERS = frozenset(SamplingParams.__struct_fields__)
"""llama.cpp has a sampler for every field."""


def build_chain(
    params: SamplingParams, vocab: Any, *, vocab_size: int, eog_tokens: frozenset[int], window: int
) -> Any:
    """A chain in the order of SamplingParams, without the links that would do nothing.

    Args:
        params: Already checked by engine.guards.
        vocab: llama.cpp's vocabulary; DRY reads its sequence breakers with it.
        vocab_size: Number of tokens.
        eog_tokens: Forbidden when `ignore_eos` is set.
        window: The context in tokens; no history is longer, and samplers allocate by it.

    Returns:
        A `llama_sampler *` that the caller frees.
    """
    chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())

    def add(sampler: Any) -> None:
        lib.llama_sampler_chain_add(chain, sampler)

    _add_bias(add, params, vocab_size, eog_tokens)
    if params.repeat_penalty != 1.0 or params.presence_penalty or params.frequency_penalty:
        add(
            lib.llama_sampler_init_penalties(
                vocab_size,
                min(params.repeat_last_n, window),
                params.repeat_penalty,
                params.frequency_penalty,
                params.presence_penalty,
            )
        )
    _add_dry(add, params, vocab, window)
    if params.is_greedy:
        add(lib.llama_sampler_init_greedy())
        return chain
    seed = params.seed if params.seed is not None else secrets.randbelow(_NUM_SEEDS)
    seed %= _NUM_SEEDS
    if params.top_k > 0:
        add(lib.llama_sampler_init_top_k(min(params.top_k, vocab_size)))
    if params.typical_p < 1.0:
        add(lib.llama_sampler_init_typical(params.typical_p, _MIN_KEEP))
    if params.top_p < 1.0:
        add(lib.llama_sampler_init_top_p(params.top_p, _MIN_KEEP))
    if params.min_p > 0.0:
        add(lib.llama_sampler_init_min_p(params.min_p, _MIN_KEEP))
    if params.xtc_probability > 0.0:
        add(
            lib.llama_sampler_init_xtc(
                params.xtc_probability, params.xtc_threshold, _MIN_KEEP, seed
            )
        )
    add(lib.llama_sampler_init_temp(params.temperature))
    add(lib.llama_sampler_init_dist(seed))
    return chain


def _add_bias(
    add: Any, params: SamplingParams, vocab_size: int, eog_tokens: frozenset[int]
) -> None:
    biases = list(params.logit_bias)
    if params.ignore_eos:
        biases += [(token, float("-inf")) for token in sorted(eog_tokens)]
    if biases:
        array = (lib.llama_logit_bias * len(biases))(*biases)
        add(lib.llama_sampler_init_logit_bias(vocab_size, len(biases), array))


def _add_dry(add: Any, params: SamplingParams, vocab: Any, window: int) -> None:
    if params.dry_multiplier == 0.0:
        return
    breakers = [text.encode("utf-8", "replace") for text in params.dry_sequence_breakers]
    array = (ctypes.c_char_p * len(breakers))(*breakers)
    add(
        lib.llama_sampler_init_dry(
            vocab,
            params.dry_multiplier,
            params.dry_base,
            params.dry_allowed_length,
            min(params.dry_penalty_last_n, window),
            array,
            len(breakers),
        )
    )
