"""One answer on the gateway's side."""

import asyncio

import pytest
from support.models import plan_for

from brim.core.answer import Delta, FinishReason
from brim.errors import WorkerDied
from brim.runtime.answer import StreamedAnswer

pytestmark = pytest.mark.anyio

STOP = FinishReason.STOP


def answer_with(num_choices: int, cancelled: list[int] | None = None) -> StreamedAnswer:
    return StreamedAnswer(
        7,
        num_prompt_tokens=1,
        max_tokens=5,
        num_choices=num_choices,
        plan=plan_for("toy"),
        on_cancel=([] if cancelled is None else cancelled).append,
    )


async def test_what_arrives_between_two_looks_comes_as_one_batch() -> None:
    """Merged for each choice."""
    answer = answer_with(2)
    for text in "ab":
        answer.push(Delta(text=text))
        answer.push(Delta(index=1, text=text.upper()))
    stream = aiter(answer)
    assert [delta.text for delta in await anext(stream)] == ["ab", "AB"]
    answer.push(Delta(text="c", finish_reason=STOP))
    answer.push(Delta(index=1, finish_reason=STOP))
    assert [delta.finish_reason for delta in await anext(stream)] == [STOP, STOP]
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_a_reader_that_waits_is_woken() -> None:
    """By the next delta, without polling, as often as it waits."""
    answer = answer_with(1)
    stream = aiter(answer)
    for text in "ab":
        reading = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        assert not reading.done()
        answer.push(Delta(text=text))
        assert [delta.text for delta in await reading] == [text]


async def test_each_choice_ends_once() -> None:
    """Deltas after an end are dropped, and an error ends only what is still owed."""
    answer = answer_with(2)
    answer.push(Delta(text="a", finish_reason=STOP))
    answer.push(Delta(text="more", finish_reason=STOP))
    answer.end(FinishReason.ERROR, WorkerDied("it died"))
    answer.end(FinishReason.ERROR, WorkerDied("it died"))
    deltas = [delta for batch in [deltas async for deltas in answer] for delta in batch]
    assert [(delta.index, delta.text, delta.finish_reason) for delta in deltas] == [
        (0, "a", STOP),
        (1, "", FinishReason.ERROR),
    ]
    assert deltas[1].error is not None
    assert deltas[1].error.message == "it died"


async def test_only_a_running_answer_can_be_cancelled() -> None:
    """Cancelling after the end, and leaving the loop at the end, tell the host nothing."""
    cancelled: list[int] = []
    answer = answer_with(1, cancelled)
    answer.push(Delta(finish_reason=STOP))
    assert [len(deltas) async for deltas in answer] == [1]
    answer.cancel()
    assert cancelled == []


async def test_leaving_the_loop_early_cancels() -> None:
    """A client that goes away reaches the host by the end of its iteration."""
    cancelled: list[int] = []
    answer = answer_with(1, cancelled)
    answer.push(Delta(text="a"))
    stream = aiter(answer)
    await anext(stream)
    await stream.aclose()  # type: ignore[attr-defined]
    assert cancelled == [7]
