"""Summaries of what conversations must leave out, written by the model itself.

The worker says what does not fit (`Counted.to_summarize`); here an ordinary request of the same
model summarises it, and the worker is asked for the prompt again with the result.  The same turns
give the same summary, so that the next request of the conversation begins as the last one did.
"""

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable

import msgspec

from brim.chat.overflow import ToSummarize, summary_prompt
from brim.core.answer import FinishReason, OverflowReport, Timings
from brim.core.request import OverflowPolicy, Request
from brim.core.sampling import SamplingParams
from brim.errors import BrimError, ContextOverflow, EngineError
from brim.runtime.api import Answer
from brim.runtime.worker_process import WorkerProcess
from brim.worker.protocol import Counted

MAX_SUMMARIES = 1024
"""Remembered for each model: a few kilobytes each."""

END_OF_THOUGHT = "</think>"
"""Closes what reasoning models write before they answer; it is no part of a summary."""

Ask = Callable[[WorkerProcess, Request], Awaitable[Answer]]
"""Admits a request of ours to the worker that holds the conversation."""


class Cost(msgspec.Struct):
    """What writing a summary took."""

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_completion_tokens: int = 0

    def add(self, timings: Timings | None) -> None:
        """Count one of its requests."""
        if timings is not None:
            self.num_prompt_tokens += timings.num_prompt_tokens
            self.num_cached_tokens += timings.num_cached_tokens
            self.num_completion_tokens += timings.num_completion_tokens


class Writing:
    """One summary on its way, and how many requests wait for it."""

    def __init__(self, task: "asyncio.Task[str]") -> None:
        self.task = task
        self.num_waiting = 0


class Summaries:
    """Prepares prompts, with a summary where they need one.

    Args:
        ask: Runs a request of ours.
    """

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._written: OrderedDict[bytes, str] = OrderedDict()
        self._writing: dict[bytes, Writing] = {}

    async def prepare(self, worker: WorkerProcess, ticket: int, request: Request) -> Counted:
        """Tokens of the request's prompt as `WorkerProcess.prepare` counts them.

        A request that is cancelled while it waits for its summary ends the writing, unless another
        one waits for it too.

        Raises:
            BrimError: The prompt was refused, or its summary could not be written: the message says
                which.
        """
        counted = await worker.prepare(ticket, request)
        if counted.to_summarize is None:
            return counted
        started_s = time.monotonic()
        summary, cost = await self._summary(worker, request, counted.to_summarize)
        waited_s = time.monotonic() - started_s
        counted = await worker.prepare(ticket, request, summary)
        if counted.overflow is None:
            return counted
        return msgspec.structs.replace(
            counted, overflow=_with_cost(counted.overflow, cost, waited_s)
        )

    async def _summary(
        self, worker: WorkerProcess, request: Request, work: ToSummarize
    ) -> tuple[str, Cost]:
        """The summary of all pieces: remembered, awaited or written; and what this request paid."""
        key = _keys(request, work)[-1]
        written = self._written.get(key)
        if written is not None:
            self._written.move_to_end(key)
            return written, Cost()
        cost = Cost()
        writing = self._writing.get(key)
        if writing is None:
            task = asyncio.get_running_loop().create_task(
                self._write(worker, request, work, cost), name=f"summary for {request.request_id}"
            )
            writing = self._writing[key] = Writing(task)
        writing.num_waiting += 1
        try:
            return await asyncio.shield(writing.task), cost
        except BrimError as error:
            raise _failed(error) from error
        finally:
            writing.num_waiting -= 1
            if writing.num_waiting == 0:
                # At once, lest the next request wait for what has been cancelled.
                self._forget(key, writing)
                writing.task.cancel()

    async def _write(
        self, worker: WorkerProcess, request: Request, work: ToSummarize, cost: Cost
    ) -> str:
        """Summarise piece by piece, each with the summary of those before it.

        What was written when the conversation was shorter is the summary of its first pieces.
        """
        summary = ""
        for index, key in enumerate(_keys(request, work)):
            written = self._written.get(key)
            if written is None:
                written = await self._piece(worker, request, work, index, summary, cost)
                self._remember(key, written)
            summary = written
        return summary

    async def _piece(
        self,
        worker: WorkerProcess,
        request: Request,
        work: ToSummarize,
        index: int,
        summary: str,
        cost: Cost,
    ) -> str:
        """The summary of one piece and what went before it."""
        asked = msgspec.structs.replace(
            request,
            request_id=f"{request.request_id}-summary-{index + 1}",
            max_tokens=work.max_tokens,
            num_choices=1,
            stop=(),
            sampling=SamplingParams(temperature=0.0),
            # Understood by templates of models that can answer without thinking first.
            template_variables={**request.template_variables, "enable_thinking": False},
            overflow=OverflowPolicy.REJECT,
        )
        while True:
            messages = summary_prompt(work, index, summary)
            asked = msgspec.structs.replace(asked, messages=messages)
            try:
                return _without_thought(await self._text(worker, asked, cost))
            except ContextOverflow:
                if not summary:
                    raise
                # As text it may be more tokens than it was drawn as, and than there is room for.
                summary = summary[: len(summary) * 3 // 4]

    async def _text(self, worker: WorkerProcess, request: Request, cost: Cost) -> str:
        answer = await self._ask(worker, request)
        parts: list[str] = []
        async for deltas in answer:
            for delta in deltas:
                parts.append(delta.text)
                cost.add(delta.timings)
                if delta.error is not None:
                    raise delta.error.exception()
                if delta.finish_reason is FinishReason.CANCELLED:
                    raise EngineError("it was cancelled")
        return "".join(parts)

    def _remember(self, key: bytes, summary: str) -> None:
        self._written[key] = summary
        if len(self._written) > MAX_SUMMARIES:
            self._written.popitem(last=False)

    def _forget(self, key: bytes, writing: Writing) -> None:
        if self._writing.get(key) is writing:
            del self._writing[key]


def _keys(request: Request, work: ToSummarize) -> list[bytes]:
    """What names the summary of each piece and all before it.

    Clients of other namespaces have their own: how fast a summary comes must not tell them what
    someone else talks about.
    """
    frame = (request.cache_namespace, request.template_variables, work.system, work.max_tokens)
    key = hashlib.sha256(msgspec.msgpack.encode(frame, order="deterministic")).digest()
    keys = []
    for piece in work.pieces:
        key = hashlib.sha256(key + msgspec.msgpack.encode(piece)).digest()
        keys.append(key)
    return keys


def _without_thought(text: str) -> str:
    """The summary in what the model wrote.

    Raises:
        EngineError: There is none.

    Example:
        >>> _without_thought("<think>Hm.</think> They met. ")
        'They met.'
    """
    # Bytes that are no text came as replacement characters, and would go back as more tokens than
    # were drawn.
    summary = text.rpartition(END_OF_THOUGHT)[2].replace("\N{REPLACEMENT CHARACTER}", "").strip()
    if not summary or summary.startswith("<think>"):
        raise EngineError("the model wrote nothing but thoughts" if summary else "it is empty")
    return summary


def _failed(error: BrimError) -> BrimError:
    """The error of a request whose summary could not be written, of the same class."""
    return type(error)(
        f"the conversation is over the window, and summarizing its older turns failed: "
        f'{error.message}; send it again, shorten it, or use the overflow policy "trim"',
        param=error.param,
        retry_after_s=error.retry_after_s,
    )


def _with_cost(report: OverflowReport, cost: Cost, waited_s: float) -> OverflowReport:
    return msgspec.structs.replace(
        report,
        summary_s=waited_s,
        num_summary_prompt_tokens=cost.num_prompt_tokens,
        num_summary_cached_tokens=cost.num_cached_tokens,
        num_summary_completion_tokens=cost.num_completion_tokens,
    )
