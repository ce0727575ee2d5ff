"""Checks that every engine makes before its backend is touched.

Backends abort the process on what these turn into errors: llama.cpp on more rows than `n_batch`,
more outputs than `n_outputs_max`, a sequence id out of range.  One implementation, so that all
engines refuse the same things with the same words.
"""

import math
from collections.abc import Mapping
from typing import TypeVar

from brim.core.plan import Plan
from brim.core.sampling import SamplingParams
from brim.core.step import StepPlan
from brim.engine.numpy_sampler import allowed_tokens
from brim.errors import Busy, CapacityError, DoesNotFit, EngineError, InvalidRequest, Unsupported

S = TypeVar("S")

_DEFAULTS = SamplingParams()

# Backends take C floats and 32-bit ints: a larger value would arrive as another one.
_FLOAT32_MAX = 3.4028234e38
_FLOAT32_MIN = 1.1754944e-38
_INT32_MAX = 2**31 - 1

_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0, _FLOAT32_MAX),
    "top_k": (0, _INT32_MAX),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "typical_p": (0, 1),
    "repeat_penalty": (_FLOAT32_MIN, _FLOAT32_MAX),
    "presence_penalty": (-_FLOAT32_MAX, _FLOAT32_MAX),
    "frequency_penalty": (-_FLOAT32_MAX, _FLOAT32_MAX),
    "repeat_last_n": (0, _INT32_MAX),
    "dry_multiplier": (0, _FLOAT32_MAX),
    "dry_base": (0, _FLOAT32_MAX),
    "dry_allowed_length": (0, _INT32_MAX),
    "dry_penalty_last_n": (0, _INT32_MAX),
    "xtc_probability": (0, 1),
    "xtc_threshold": (0, 1),
    "seed": (0, 2**64 - 1),
    "num_logprobs": (0, _INT32_MAX),
}
"""Every numeric field of SamplingParams; a test compares the names."""


def known(sequences: Mapping[int, S], seq_id: int) -> S:
    """The open sequence of that id.

    Raises:
        EngineError: It is not open.
    """
    sequence = sequences.get(seq_id)
    if sequence is None:
        raise EngineError(f"sequence {seq_id} is not open")
    return sequence


def free_slot(sequences: Mapping[int, object], max_sequences: int) -> int:
    """The lowest id that is not open.

    Raises:
        Busy: All `max_sequences` are open.
    """
    for seq_id in range(max_sequences):
        if seq_id not in sequences:
            return seq_id
    raise Busy(f"all {max_sequences} sequences are in use", retry_after_s=1.0)


def check_fork(num_source: int, num_target: int, num_tokens: int) -> None:
    """A fork needs an empty target and a long enough source."""
    if num_target:
        raise EngineError(f"the target sequence already holds {num_target} tokens")
    if not 0 <= num_tokens <= num_source:
        raise EngineError(f"cannot share {num_tokens} tokens of a sequence of {num_source}")


def check_whole(num_source: int, num_tokens: int, owner: str) -> None:
    """A fork of state that cannot be cut takes all of it.

    Args:
        num_source: Tokens of the source.
        num_tokens: How many are to be shared.
        owner: The engine and the architecture, for the message.
    """
    if num_tokens < num_source:
        raise EngineError(f"{owner} can only be forked whole")


def check_range(length: int, start: int, end: int | None) -> int:
    """The end of the part of a sequence that is asked for.

    Raises:
        EngineError: The part is empty, or not the sequence's.
    """
    end = length if end is None else end
    if not 0 <= start < end <= length:
        raise EngineError(f"tokens {start} to {end} of a sequence that has {length}")
    return end


def check_whole_range(length: int, start: int, end: int, owner: str) -> None:
    """Refuse a part where only whole sequences can be kept.

    Raises:
        EngineError: It is a part.
    """
    if start != 0 or end != length:
        raise EngineError(f"{owner} is kept whole, not from {start} to {end} of {length}")


def check_shift(length: int, num_kept: int, num_dropped: int) -> None:
    """Refuse to drop what is not there.

    Raises:
        EngineError: The sequence is shorter than what is kept and dropped.
    """
    if num_kept < 0 or num_dropped < 1 or num_kept + num_dropped > length:
        raise EngineError(
            f"cannot drop {num_dropped} tokens behind {num_kept} of a sequence that has {length}"
        )


def check_truncate(num_held: int, num_tokens: int) -> None:
    """A sequence can only be made shorter."""
    if not 0 <= num_tokens <= num_held:
        raise EngineError(f"cannot cut a sequence of {num_held} tokens to {num_tokens}")


def check_resize(num_used: int, num_tokens: int) -> None:
    """The pool must keep every cell in use."""
    if num_tokens < max(num_used, 1):
        raise DoesNotFit(
            f"a KV pool of {num_tokens} tokens is too small: {num_used} are in use; "
            "close sequences first"
        )


def check_room(num_tokens: int, num_free: int, error: type[CapacityError]) -> None:
    """Tokens need free cells; `error` says whether waiting for some can help."""
    if num_tokens > num_free:
        raise error(f"the KV pool has no room for {num_tokens} more tokens", retry_after_s=1.0)


def submitted(step: StepPlan | None) -> StepPlan:
    """The step that `collect` is to finish.

    Raises:
        EngineError: None was submitted.
    """
    if step is None:
        raise EngineError("collect without submit")
    return step


def check_sampling(params: SamplingParams, samplers: frozenset[str], vocab_size: int) -> None:
    """Refuse values that a backend would abort on, truncate or silently ignore.

    Raises:
        Unsupported: A parameter that differs from its default has no effect on this engine.
        InvalidRequest: A value is out of range.
    """
    for name, (low, high) in _RANGES.items():
        value = getattr(params, name)
        if value is None:
            continue
        # Written so that NaN, which compares false with everything, is refused too.
        if not low <= value <= high:
            raise InvalidRequest(
                f"{name} is {value}; it must be from {low:g} to {high:g}", param=name
            )
        if name not in samplers and value != getattr(_DEFAULTS, name):
            raise Unsupported(f"{name} has no effect on this engine; leave it out", param=name)
    for token, bias in params.logit_bias:
        if not (0 <= token < vocab_size and (abs(bias) <= _FLOAT32_MAX or bias == -math.inf)):
            raise InvalidRequest(
                f"logit_bias names token {token} with {bias}; token ids of this model go from 0 to "
                f"{vocab_size - 1} and a bias is a number",
                param="logit_bias",
            )


def check_step(
    step: StepPlan,
    plan: Plan,
    lengths: Mapping[int, int],
    vocab_size: int,
    submitted: StepPlan | None,
) -> None:
    """Refuse a step that breaks a limit of the loaded plan.

    Args:
        step: What is to be fed.
        plan: The limits.
        lengths: Tokens held by each open sequence.
        vocab_size: Token ids go from 0 to this, exclusive.
        submitted: The step that was submitted and not collected yet, if any.

    Raises:
        EngineError: It breaks one; the message has the numbers.
    """
    if submitted is not None:
        raise EngineError("a step was submitted before the last one was collected")
    num_rows, seen = 0, set()
    for feed in step.feeds:
        num_held = lengths.get(feed.seq_id)
        if num_held is None:
            raise EngineError(f"sequence {feed.seq_id} is not open")
        if feed.seq_id in seen:
            raise EngineError(f"sequence {feed.seq_id} stands twice in one step")
        seen.add(feed.seq_id)
        num_fed = len(feed.tokens)
        if num_fed == 0:
            raise EngineError(f"sequence {feed.seq_id} is fed nothing")
        if num_held + num_fed > plan.context_tokens:
            raise EngineError(
                f"sequence {feed.seq_id} would reach {num_held + num_fed} tokens; "
                f"the context is {plan.context_tokens}"
            )
        if min(feed.tokens) < 0 or max(feed.tokens) >= vocab_size:
            raise EngineError(
                f"sequence {feed.seq_id} is fed a token outside 0 to {vocab_size - 1}"
            )
        if feed.mask is not None:
            allowed_tokens(feed.mask, vocab_size)
        num_rows += num_fed
    if num_rows == 0:
        raise EngineError("a step without rows")
    if num_rows > plan.max_batch_tokens:
        raise EngineError(f"a step of {num_rows} rows; the plan allows {plan.max_batch_tokens}")
