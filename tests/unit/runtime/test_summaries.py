"""Who writes a summary, who waits for it, and who pays: worker and model are scripted."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

import msgspec
import pytest

from brim.chat.overflow import ToSummarize
from brim.core.answer import Delta, ErrorInfo, FinishReason, OverflowReport, Timings
from brim.core.request import Message, OverflowPolicy, Request
from brim.errors import BrimError, Busy, ContextOverflow, EngineError
from brim.runtime import summaries
from brim.runtime.api import Answer
from brim.runtime.summaries import Summaries
from brim.runtime.worker_process import WorkerProcess
from brim.worker.protocol import Counted

pytestmark = pytest.mark.anyio

TIMINGS = Timings(
    queue_s=0.0,
    prefill_s=0.1,
    decode_s=0.1,
    num_prompt_tokens=50,
    num_cached_tokens=40,
    num_completion_tokens=7,
)
REQUEST = Request(
    request_id="r", model="m", messages=(), overflow=OverflowPolicy.SUMMARIZE, num_choices=2
)


def turns(*texts: str) -> tuple[Message, ...]:
    return tuple(Message(role="user", content=text) for text in texts)


def work(*pieces: str) -> ToSummarize:
    return ToSummarize(system=(), pieces=tuple(turns(piece) for piece in pieces), max_tokens=64)


class ScriptedWorker:
    """Wants `work` summarised, and notes the summaries that it is given."""

    def __init__(self, work: ToSummarize | None) -> None:
        self.work = work
        self.summaries: list[str | None] = []

    async def prepare(self, ticket: int, request: Request, summary: str | None = None) -> Counted:
        self.summaries.append(summary)
        if summary is None:
            return Counted(ticket, 900, to_summarize=self.work)
        report = OverflowReport(
            policy=request.overflow,
            num_tokens_before=900,
            num_tokens_after=500,
            num_removed_tokens=420,
            num_summary_tokens=20,
        )
        return Counted(ticket, 500, overflow=report)


class ScriptedModel:
    """Answers when it is let go, with the last letters of what it was asked."""

    def __init__(self, ending: Callable[[Request], Delta] | None = None) -> None:
        self.asked: list[Request] = []
        self.go = asyncio.Event()
        self.go.set()
        self.num_cancelled = 0
        self._ending = ending or self._summary

    def _summary(self, request: Request) -> Delta:
        assert request.messages is not None
        text = f" S{len(self.asked)} "
        return Delta(text=text, finish_reason=FinishReason.STOP, timings=TIMINGS)

    async def ask(self, worker: WorkerProcess, request: Request) -> Answer:
        self.asked.append(request)
        return cast("Answer", self._answer(request))

    async def _answer(self, request: Request) -> AsyncIterator[list[Delta]]:
        try:
            await self.go.wait()
            yield [self._ending(request)]
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise


def made(ending: Callable[[Request], Delta] | None = None) -> tuple[ScriptedModel, Summaries]:
    model = ScriptedModel(ending)
    return model, Summaries(model.ask)


async def prepared(found: Summaries, worker: ScriptedWorker, **fields: Any) -> Counted:
    request = msgspec.structs.replace(REQUEST, **fields)
    return await found.prepare(cast("WorkerProcess", worker), 1, request)


async def test_a_prompt_that_needs_no_summary_is_passed_on() -> None:
    """Nothing is asked of the model."""
    model, found = made()
    assert (await prepared(found, ScriptedWorker(None))).num_prompt_tokens == 900
    assert model.asked == []


async def test_a_summary_is_asked_for_greedily_and_its_cost_reported() -> None:
    """One answer, bounded; the worker gets its text and the client what it took."""
    model, found = made()
    worker = ScriptedWorker(work("a"))
    counted = await prepared(found, worker)
    assert worker.summaries == [None, "S1"]
    (asked,) = model.asked
    assert (asked.max_tokens, asked.num_choices, asked.sampling.temperature) == (64, 1, 0.0)
    assert asked.overflow is OverflowPolicy.REJECT
    report = counted.overflow
    assert report is not None
    assert report.num_summary_prompt_tokens == 50
    assert report.num_summary_cached_tokens == 40
    assert report.num_summary_completion_tokens == 7
    assert report.summary_s >= 0


async def test_a_summary_is_remembered_and_costs_nothing_again() -> None:
    """The same turns, the same words; another namespace has its own."""
    model, found = made()
    worker = ScriptedWorker(work("a"))
    await prepared(found, worker)
    again = await prepared(found, worker)
    assert worker.summaries == [None, "S1", None, "S1"]
    assert again.overflow is not None
    assert again.overflow.num_summary_prompt_tokens == 0
    await prepared(found, worker, cache_namespace="other")
    assert len(model.asked) == 2


async def test_a_longer_conversation_adds_to_the_summary_of_its_beginning() -> None:
    """Only the new piece is read, under the summary of those before it."""
    model, found = made()
    await prepared(found, ScriptedWorker(work("a")))
    worker = ScriptedWorker(work("a", "b"))
    await prepared(found, worker)
    assert worker.summaries == [None, "S2"]
    assert len(model.asked) == 2
    content = (model.asked[1].messages or ())[0].content
    assert "S1" in content
    assert "\n\nb\n\n" in content


async def test_an_earlier_summary_gives_way_where_its_text_is_too_long() -> None:
    """Its end goes until the piece fits; a piece that never fits is an error with the numbers."""
    refusal = ErrorInfo.of(ContextOverflow("prompt is 999 tokens"))
    model, found = made(
        lambda request: (
            Delta(text="long summary", finish_reason=FinishReason.STOP)
            if "long s" not in (request.messages or ())[0].content
            else Delta(finish_reason=FinishReason.ERROR, error=refusal)
        )
    )
    worker = ScriptedWorker(work("a", "b"))
    await prepared(found, worker)
    contents = [(request.messages or ())[0].content for request in model.asked]
    assert ["long summary\n" in content for content in contents] == [False, True, *[False] * 3]
    assert "long\n\nb" in contents[-1]
    model, found = made(lambda request: Delta(finish_reason=FinishReason.ERROR, error=refusal))
    with pytest.raises(ContextOverflow, match="failed: prompt is 999 tokens"):
        await prepared(found, worker)


async def test_requests_at_once_wait_for_one_summary() -> None:
    """Of three, one is cancelled; the other two get what was asked for once, and one has paid."""
    model, found = made()
    model.go.clear()
    worker = ScriptedWorker(work("a"))
    waiting = [asyncio.ensure_future(prepared(found, worker)) for _ in range(3)]
    while not model.asked:  # noqa: ASYNC110
        await asyncio.sleep(0)
    waiting[1].cancel()
    await asyncio.sleep(0)
    model.go.set()
    await asyncio.wait(waiting)
    assert [each.cancelled() for each in waiting] == [False, True, False]
    reports = [(await each).overflow for each in (waiting[0], waiting[2])]
    assert [report and report.num_summary_prompt_tokens for report in reports] == [50, 0]
    assert (len(model.asked), model.num_cancelled) == (1, 0)
    assert worker.summaries[3:] == ["S1", "S1"]


async def test_a_summary_that_nobody_waits_for_is_given_up() -> None:
    """And the next request that needs it starts anew."""
    model, found = made()
    model.go.clear()
    worker = ScriptedWorker(work("a"))
    waiting = asyncio.ensure_future(prepared(found, worker))
    while not model.asked:  # noqa: ASYNC110
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    waiting.cancel()
    again = asyncio.ensure_future(prepared(found, worker))
    await asyncio.wait([waiting])
    model.go.set()
    assert (await again).overflow is not None
    assert waiting.cancelled()
    assert (len(model.asked), model.num_cancelled) == (2, 1)


@pytest.mark.parametrize(
    ("delta", "error", "message"),
    [
        (Delta(text="  ", finish_reason=FinishReason.STOP), EngineError, "failed: it is empty"),
        (
            Delta(text="\N{REPLACEMENT CHARACTER}", finish_reason=FinishReason.STOP),
            EngineError,
            "failed: it is empty",
        ),
        (
            Delta(text="<think>Hm", finish_reason=FinishReason.LENGTH),
            EngineError,
            "nothing but thoughts",
        ),
        (
            Delta(
                finish_reason=FinishReason.ERROR,
                error=ErrorInfo.of(Busy("it is late", retry_after_s=3.0)),
            ),
            Busy,
            r'failed: it is late; .*"trim"',
        ),
        (Delta(finish_reason=FinishReason.CANCELLED), EngineError, "it was cancelled"),
    ],
)
async def test_what_goes_wrong_is_said_and_not_remembered(
    delta: Delta, error: type[BrimError], message: str
) -> None:
    """The error is of its own class, with the time after which to come again."""
    model, found = made(lambda request: delta)
    worker = ScriptedWorker(work("a"))
    for _ in range(2):
        with pytest.raises(error, match=message) as caught:
            await prepared(found, worker)
        assert caught.value.retry_after_s == (3.0 if error is Busy else None)
    assert len(model.asked) == 2
    assert worker.summaries == [None, None]


async def test_the_oldest_summaries_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded by number; a summary that is used stays."""
    monkeypatch.setattr(summaries, "MAX_SUMMARIES", 2)
    model, found = made()
    for name in "abaca":
        await prepared(found, ScriptedWorker(work(name)))
    assert len(model.asked) == 3
    await prepared(found, ScriptedWorker(work("b")))
    assert len(model.asked) == 4
