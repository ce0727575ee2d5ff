"""How much KV a request may come to need, and whether it can ever run: one arithmetic.

The gateway asks before it starts a request and the scheduler before it opens sequences; both ask
here, so what one has granted the other has room for.
"""

from brim.core.plan import Plan
from brim.errors import ContextOverflow, InvalidRequest


def answer_bound(
    num_prompt_tokens: int,
    max_tokens: int | None,
    *,
    context_tokens: int,
    answer_tokens: int,
    may_outgrow: bool = False,
) -> int:
    """Most tokens that one choice may produce.

    Args:
        num_prompt_tokens: Length of the prompt.
        max_tokens: What the client asked for; None leaves it to the two below.
        context_tokens: The window: prompt and answer together.
        answer_tokens: Bound of an answer for which no `max_tokens` was given.
        may_outgrow: The window bounds the prompt alone: older tokens go as the answer grows.

    Raises:
        ContextOverflow: Prompt, or prompt and `max_tokens`, are over the window.
        InvalidRequest: `max_tokens` is below 1.

    Example:
        >>> answer_bound(8000, None, context_tokens=8192, answer_tokens=1024)
        192
        >>> answer_bound(8000, 900, context_tokens=8192, answer_tokens=1024, may_outgrow=True)
        900
    """
    room = context_tokens - num_prompt_tokens
    if room < 1:
        raise ContextOverflow(
            f"prompt is {num_prompt_tokens} tokens, context is {context_tokens}; shorten it by "
            f"{1 - room} or load with a larger --context"
        )
    if max_tokens is None:
        return answer_tokens if may_outgrow else min(answer_tokens, room)
    if max_tokens < 1:
        raise InvalidRequest(
            f"max_tokens is {max_tokens}; it must be at least 1", param="max_tokens"
        )
    if max_tokens > room and not may_outgrow:
        raise ContextOverflow(
            f"prompt is {num_prompt_tokens} tokens and max_tokens {max_tokens}, context is "
            f"{context_tokens}; ask for at most {room} or load with a larger --context",
            param="max_tokens",
        )
    return max_tokens


def answer_share(
    num_prompt_tokens: int, num_choices: int, *, kv_tokens: int, forks_share_kv: bool
) -> int:
    """Longest answer of each choice with which the request has room in an empty pool.

    Bounds answers for which no `max_tokens` was given: several long ones must not make a request
    impossible that the client left open.  Below 1 where the prompts alone are too much.

    Example:
        >>> answer_share(100, 8, kv_tokens=1000, forks_share_kv=True)
        112
        >>> answer_share(100, 8, kv_tokens=1000, forks_share_kv=False)
        25
    """
    if forks_share_kv:
        return (kv_tokens - num_prompt_tokens) // num_choices
    return kv_tokens // num_choices - num_prompt_tokens


def kv_bound(
    num_prompt_tokens: int, max_tokens: int, num_choices: int, *, forks_share_kv: bool
) -> int:
    """Cells of the KV pool that a request never exceeds.

    Choices share the prompt's cells where the engine's forks do; where a fork is a copy, each has
    its own.

    Example:
        >>> kv_bound(100, 10, 4, forks_share_kv=True)
        140
        >>> kv_bound(100, 10, 4, forks_share_kv=False)
        440
    """
    if forks_share_kv:
        return num_prompt_tokens + num_choices * max_tokens
    return num_choices * (num_prompt_tokens + max_tokens)


def check_choices(num_choices: int, plan: Plan) -> None:
    """Refuse a number of choices that could never run at once.

    Raises:
        InvalidRequest: None, or more than the plan has sequences.
    """
    if num_choices < 1:
        raise InvalidRequest(f"n is {num_choices}; it must be at least 1", param="n")
    if num_choices > plan.max_sequences:
        raise InvalidRequest(
            f"n is {num_choices}; this model is loaded for {plan.max_sequences} sequences: "
            f"ask for at most {plan.max_sequences} choices",
            param="n",
        )


def check_fits(kv_tokens: int, plan: Plan) -> None:
    """Refuse what would wait forever.

    Args:
        kv_tokens: The request's `kv_bound`.
        plan: The limits of the loaded model.

    Raises:
        InvalidRequest: More KV than the whole pool.
    """
    if kv_tokens > plan.kv_tokens:
        raise InvalidRequest(
            f"the request may need {kv_tokens} tokens of KV, the whole pool has {plan.kv_tokens}: "
            f"{kv_tokens - plan.kv_tokens} too many; lower n or max_tokens, or shorten the prompt"
        )
