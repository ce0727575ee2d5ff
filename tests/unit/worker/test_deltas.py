"""Merging of deltas that wait for a slow reader."""

from brim.core.answer import Delta, ErrorInfo, FinishReason, Timings, TokenLogprob
from brim.worker.deltas import DeltaBuffer

TIMINGS = Timings(
    queue_s=0, prefill_s=1, decode_s=2, num_prompt_tokens=3, num_cached_tokens=0,
    num_completion_tokens=4,
)  # fmt: skip


def logprob(token: int) -> TokenLogprob:
    return TokenLogprob(token_id=token, piece=b"x", logprob=-1.0)


def test_a_delta_that_waits_alone_comes_out_as_it_went_in() -> None:
    """The common case copies nothing."""
    buffer, delta = DeltaBuffer(), Delta(text="a", num_tokens=1)
    buffer.add([(1, delta)])
    [(ticket, taken)] = buffer.take()
    assert ticket == 1
    assert taken is delta


def test_deltas_of_one_choice_become_one() -> None:
    """Texts join, counts add, logprobs keep their order, and the ending's fields survive."""
    buffer = DeltaBuffer()
    error = ErrorInfo(kind="EngineError", message="gone")
    buffer.add([(1, Delta(text="a", num_tokens=1, logprobs=(logprob(1),)))])
    buffer.add([(1, Delta(text="b", num_tokens=2, logprobs=(logprob(2), logprob(3))))])
    last = Delta(
        text="c", num_tokens=1, finish_reason=FinishReason.ERROR, stop_string="!",
        timings=TIMINGS, error=error,
    )  # fmt: skip
    buffer.add([(1, last)])
    assert buffer.take() == [
        (
            1,
            Delta(
                text="abc", num_tokens=4, logprobs=(logprob(1), logprob(2), logprob(3)),
                finish_reason=FinishReason.ERROR, stop_string="!", timings=TIMINGS, error=error,
            ),
        )
    ]  # fmt: skip


def test_choices_and_tickets_stay_apart() -> None:
    """Only deltas of the same ticket and index are merged, in the order of their first delta."""
    buffer = DeltaBuffer()
    buffer.add([(2, Delta(index=1, text="a")), (1, Delta(index=1, text="b"))])
    buffer.add([(2, Delta(index=0, text="c")), (2, Delta(index=1, text="d"))])
    assert [(ticket, delta.index, delta.text) for ticket, delta in buffer.take()] == [
        (2, 1, "ad"),
        (1, 1, "b"),
        (2, 0, "c"),
    ]


def test_what_was_taken_is_gone() -> None:
    """A buffer can be filled again after it was emptied."""
    buffer = DeltaBuffer()
    buffer.add([(1, Delta(text="a"))])
    buffer.take()
    assert len(buffer) == 0
    assert buffer.take() == []
    buffer.add([(1, Delta(text="b"))])
    assert buffer.take() == [(1, Delta(text="b"))]
