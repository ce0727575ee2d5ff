"""How long an answer may be and what of the pool it may need: the plan, the stance and the app."""

import msgspec

from brim.core.plan import Plan
from brim.core.request import OverflowPolicy, Priority, Request
from brim.core.stance import Stance
from brim.errors import Busy
from brim.scheduler.admission import answer_bound, answer_share, check_fits, kv_bound
from brim.worker.protocol import Counted


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """Of one request."""

    max_tokens: int
    """Of each choice."""
    kv_tokens: int
    """Of all choices and the prompt."""


def windowed(request: Request, plan: Plan, stance: Stance) -> Request:
    """The request as the worker is to prepare it: conversations are fitted to what holds now.

    A request whose policy is to reject is prepared for the whole window, since it is refused with
    the reason and may be sent again later.
    """
    if stance.context_fraction >= 1.0 or request.overflow is OverflowPolicy.REJECT:
        return request
    window = min(window_now(plan, stance), request.max_context_tokens or plan.context_tokens)
    return msgspec.structs.replace(request, max_context_tokens=window)


def window_now(plan: Plan, stance: Stance) -> int:
    """Tokens of the window that new work may use."""
    return max(1, int(plan.context_tokens * stance.context_fraction))


def bounds_of(
    request: Request,
    counted: Counted,
    plan: Plan,
    stance: Stance,
    *,
    answer_tokens: int,
    forks_share_kv: bool,
) -> Bounds:
    """Bounds of a request before its app's budget.

    Args:
        request: The request.
        counted: Its prompt, as the worker prepared it.
        plan: How the model is loaded.
        stance: What is allowed now.
        answer_tokens: The setting's bound where a request gives none.
        forks_share_kv: Whether choices share their prompt's KV.

    Raises:
        ContextOverflow: Prompt and answer are over the window.
        InvalidRequest: They are more than the whole pool, or `max_tokens` is below 1.
        Busy: They would fit the whole window, of which new work may use a part at the moment.
    """
    num_prompt_tokens = counted.num_prompt_tokens
    share = answer_share(
        num_prompt_tokens,
        request.num_choices,
        kv_tokens=plan.kv_tokens,
        forks_share_kv=forks_share_kv,
    )
    if request.priority is Priority.INTERACTIVE and stance.max_answer_tokens is not None:
        answer_tokens = min(answer_tokens, stance.max_answer_tokens)
    if not counted.may_outgrow:
        answer_tokens = max(1, min(answer_tokens, share))
    max_tokens = answer_bound(
        num_prompt_tokens,
        request.max_tokens,
        context_tokens=min(plan.context_tokens, request.max_context_tokens or plan.context_tokens),
        answer_tokens=answer_tokens,
        may_outgrow=counted.may_outgrow,
    )
    if request.priority is Priority.BACKGROUND and stance.max_background_answer_tokens is not None:
        max_tokens = min(max_tokens, stance.max_background_answer_tokens)
    max_tokens = _within_window(request, counted, max_tokens, plan, stance)
    bounds = with_answer(request, counted, max_tokens, plan, forks_share_kv=forks_share_kv)
    check_fits(bounds.kv_tokens, plan)
    return bounds


def with_answer(
    request: Request, counted: Counted, max_tokens: int, plan: Plan, *, forks_share_kv: bool
) -> Bounds:
    """Bounds of a request whose answers are that long at most."""
    num_prompt_tokens = counted.num_prompt_tokens
    kv_tokens = kv_bound(
        num_prompt_tokens,
        min(max_tokens, plan.context_tokens - num_prompt_tokens),
        request.num_choices,
        forks_share_kv=forks_share_kv,
    )
    return Bounds(max_tokens=max_tokens, kv_tokens=kv_tokens)


def _within_window(
    request: Request, counted: Counted, max_tokens: int, plan: Plan, stance: Stance
) -> int:
    """The answer's bound in the part of the window that holds now."""
    if stance.context_fraction >= 1.0 or counted.may_outgrow:
        return max_tokens
    window, num_prompt_tokens = window_now(plan, stance), counted.num_prompt_tokens
    room = window - num_prompt_tokens
    if room >= max_tokens or (room >= 1 and request.max_tokens is None):
        return min(max_tokens, room)
    raise Busy(
        f"{stance.reason or 'memory or power is short'}, so that new requests may use {window} "
        f"tokens of context; prompt and answer are up to {num_prompt_tokens + max_tokens}: try "
        f"again in {stance.retry_after_s:.0f} s, shorten it, or set an overflow policy",
        retry_after_s=stance.retry_after_s,
    )
