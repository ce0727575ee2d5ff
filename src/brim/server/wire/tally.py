"""How each choice of one request ended, and the totals that follow."""

import msgspec

from brim.core.answer import Delta, FinishReason, OverflowReport, Timings
from brim.core.cache import CacheReport
from brim.core.plan import Plan
from brim.errors import BrimError, Busy, EngineError
from brim.runtime.api import Answer
from brim.server.wire.convert import Call
from brim.server.wire.responses import (
    BrimCache,
    BrimChoice,
    BrimInfo,
    BrimMovedLine,
    BrimOverflow,
    BrimRemovedTurn,
    FinishWord,
    PromptTokensDetails,
    Usage,
)

_CANCELLED_RETRY_S = 1.0
"""A choice that nobody here cancelled ends with the server; a restarted one answers soon."""


class Ending(msgspec.Struct, frozen=True):
    """How one choice ended."""

    reason: FinishWord
    timings: Timings
    stop_string: str | None


class Tally:
    """Collects the endings of a call's choices."""

    def __init__(self, call: Call, answer: Answer) -> None:
        self._call = call
        self._answer = answer
        self._endings: dict[int, Ending] = {}
        self._num_choices = call.num_choices

    @property
    def is_complete(self) -> bool:
        """Whether every choice has ended."""
        return len(self._endings) == self._num_choices

    def end(self, delta: Delta) -> FinishWord:
        """Note the ending of a choice whose last delta this is.

        Raises:
            BrimError: It did not end of itself; the error says why.
        """
        failure = failure_of(delta)
        if failure is not None:
            raise failure
        reason: FinishWord = "length" if delta.finish_reason is FinishReason.LENGTH else "stop"
        if delta.timings is None:
            raise EngineError(f"choice {delta.index} ended without its figures")
        self._endings[delta.index] = Ending(reason, delta.timings, delta.stop_string)
        return reason

    def check_complete(self) -> None:
        """Raise EngineError if the answer ended before every choice did."""
        if not self.is_complete:
            missing = self._num_choices - len(self._endings)
            raise EngineError(f"the answer broke off: {missing} of {self._num_choices} unfinished")

    def ending(self, index: int) -> Ending:
        """The ending of one choice."""
        return self._endings[index]

    def usage(self) -> Usage:
        """Tokens of the whole request."""
        num_prompt, _, num_completion = self._totals()
        num_cached = sum(timings.cache.num_tokens for timings in self._prompts())
        return Usage(
            prompt_tokens=num_prompt,
            completion_tokens=num_completion,
            total_tokens=num_prompt + num_completion,
            prompt_tokens_details=PromptTokensDetails(num_cached),
        )

    def info(self) -> BrimInfo:
        """The `brim` object."""
        plan, instead_of = self._answer.plan, self._answer.instead_of
        num_prompt, num_cached, num_completion = self._totals()
        choices = tuple(self._choice(index) for index in sorted(self._endings))
        first = choices[0]
        return BrimInfo(
            model=self._call.model if instead_of is None else plan.model.name,
            instead_of=instead_of,
            engine=plan.engine,
            quant=plan.model.quant,
            context_tokens=plan.context_tokens,
            max_tokens=self._answer.max_tokens,
            kv_type=kv_type(plan),
            num_prompt_tokens=num_prompt,
            num_cached_tokens=num_cached,
            num_completion_tokens=num_completion,
            num_trimmed_tokens=num_trimmed_tokens(self._answer),
            num_shifted_tokens=sum(
                ending.timings.num_shifted_tokens for ending in self._endings.values()
            ),
            cache=_cache(self.cache()),
            overflow=_overflow(self._answer.overflow),
            moved_lines=tuple(
                BrimMovedLine(
                    kind=line.kind, message_index=line.message_index, moved_to=line.moved_to.value
                )
                for line in self._answer.moved_lines
            ),
            queue_place=self._answer.queue_place,
            queue_s=first.queue_s,
            prefill_s=first.prefill_s,
            decode_s=first.decode_s,
            seed=first.seed,
            stop_string=first.stop_string,
            choices=choices if len(choices) > 1 else msgspec.UNSET,
        )

    def _totals(self) -> tuple[int, int, int]:
        """Prompt, cached and completion tokens; a prompt counts with its first choice."""
        prompts = self._prompts()
        return (
            sum(timings.num_prompt_tokens for timings in prompts),
            sum(timings.num_cached_tokens for timings in prompts),
            sum(ending.timings.num_completion_tokens for ending in self._endings.values()),
        )

    def _prompts(self) -> list[Timings]:
        """Of the first choice of each prompt."""
        choices_per_prompt = self._call.requests[0].num_choices
        return [self._endings[i].timings for i in range(0, self._num_choices, choices_per_prompt)]

    def cache(self) -> CacheReport:
        """What the first prompt found."""
        return self._endings[0].timings.cache

    def _choice(self, index: int) -> BrimChoice:
        ending = self._endings[index]
        timings = ending.timings
        return BrimChoice(
            index=index,
            num_prompt_tokens=timings.num_prompt_tokens,
            num_cached_tokens=timings.num_cached_tokens,
            num_completion_tokens=timings.num_completion_tokens,
            queue_s=_microseconds(timings.queue_s),
            prefill_s=_microseconds(timings.prefill_s),
            decode_s=_microseconds(timings.decode_s),
            seed=timings.seed,
            stop_string=ending.stop_string,
        )


def num_trimmed_tokens(answer: Answer) -> int:
    """Prompt tokens that were left out of what the client sent."""
    return 0 if answer.overflow is None else answer.overflow.num_removed_tokens


def cache_headers(cache: CacheReport) -> list[tuple[str, str]]:
    """`x-brim-cache*`: what a prompt found, known when its answer is complete."""
    state = "miss" if not cache.num_tokens else "partial" if cache.miss else "hit"
    headers = [("x-brim-cache", state), ("x-brim-cached-tokens", str(cache.num_tokens))]
    return [*headers, ("x-brim-cache-reason", cache.reason)] if cache.reason else headers


def _cache(report: CacheReport) -> BrimCache:
    return BrimCache(
        source=report.source.value,
        cached_tokens=report.num_tokens,
        reason=report.reason,
        restore_s=_microseconds(report.restore_s),
    )


def _overflow(report: OverflowReport | None) -> BrimOverflow | None:
    if report is None:
        return None
    return BrimOverflow(
        policy=report.policy.value,
        num_tokens_before=report.num_tokens_before,
        num_tokens_after=report.num_tokens_after,
        num_removed_tokens=report.num_removed_tokens,
        num_summary_tokens=report.num_summary_tokens,
        summary_s=_microseconds(report.summary_s),
        num_summary_prompt_tokens=report.num_summary_prompt_tokens,
        num_summary_cached_tokens=report.num_summary_cached_tokens,
        num_summary_completion_tokens=report.num_summary_completion_tokens,
        removed_turns=tuple(
            BrimRemovedTurn(index=turn.index, role=turn.role, num_tokens=turn.num_tokens)
            for turn in report.removed_turns
        ),
    )


def failure_of(delta: Delta) -> BrimError | None:
    """The error that a last delta stands for; None where the choice ended of itself."""
    if delta.finish_reason is FinishReason.CANCELLED:
        return Busy(
            "the answer was cancelled because the server is stopping; ask again",
            retry_after_s=_CANCELLED_RETRY_S,
        )
    if delta.finish_reason is FinishReason.ERROR:
        if delta.error is None:
            return EngineError("the worker ended the answer with an error and did not say which")
        return delta.error.exception()
    return None


def kv_type(plan: Plan) -> str:
    """The KV types in one word."""
    k, v = plan.kv_type_k, plan.kv_type_v
    return k if k == v else f"{k}/{v}"


def _microseconds(seconds: float) -> float:
    """Rounded to what a clock can tell; sixteen digits are noise on the wire."""
    return round(seconds, 6)
