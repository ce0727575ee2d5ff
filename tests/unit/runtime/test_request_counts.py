"""Counters of requests: each ends once, and its tokens count once."""

from brim.core.answer import Delta, ErrorInfo, FinishReason, Timings
from brim.core.cache import CacheReport, CacheSource, MissReason
from brim.errors import BrimError, Busy, ContextOverflow, WorkerDied
from brim.runtime.request_counts import RequestCounter


def ended(index: int, cache: CacheReport) -> Delta:
    timings = Timings(
        queue_s=0.0, prefill_s=0.0, decode_s=0.0, num_prompt_tokens=10, num_cached_tokens=0,
        num_completion_tokens=3, cache=cache,
    )  # fmt: skip
    return Delta(index=index, finish_reason=FinishReason.STOP, timings=timings)


def test_a_prompt_counts_once_however_many_choices_it_has() -> None:
    """Answers add up, and what the prompt found is that of its first choice."""
    counter = RequestCounter()
    found = CacheReport(source=CacheSource.DISK, num_tokens=4, miss=MissReason.DIVERGES)
    for index in (1, 0):
        last = ended(index, found)
        counter.note_delta(last)
    counter.note_end(last)
    counts = counter.counts()
    assert (counts.num_prompt_tokens, counts.num_completion_tokens) == (10, 6)
    assert counts.cached_tokens == {"disk": 4}
    assert counts.misses == {"diverges": 1}
    assert counts.outcomes == {"stop": 1}


def test_errors_that_pass_are_told_from_others() -> None:
    """A 503 counts as busy wherever it came, other errors do not."""
    counter = RequestCounter()
    refusals: list[BrimError] = [Busy("full"), Busy("full"), ContextOverflow("long")]
    for refusal in refusals:
        counter.note_refusal(refusal)
    died = ErrorInfo.of(WorkerDied("killed"))
    counter.note_end(Delta(finish_reason=FinishReason.ERROR, error=died))
    counter.note_end(Delta(finish_reason=FinishReason.CANCELLED))
    counts = counter.counts()
    assert counts.refusals == {"Busy": 2, "ContextOverflow": 1}
    assert counts.outcomes == {"error": 1, "cancelled": 1}
    assert counts.num_busy == 3


def test_counts_are_a_copy() -> None:
    """What was handed out does not change any more."""
    counter = RequestCounter()
    before = counter.counts()
    counter.note_end(Delta(finish_reason=FinishReason.STOP))
    counter.note_removal(7)
    assert (before.outcomes, before.num_removed_tokens) == ({}, 0)
    assert counter.counts().num_removed_tokens == 7
