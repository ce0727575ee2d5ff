"""Several requests of the runtime behind one answer: the prompts of one completion request."""

import asyncio
from collections.abc import AsyncIterator, Sequence

import msgspec

from brim.core.answer import Delta, MovedLine, OverflowReport
from brim.core.plan import Plan
from brim.core.request import Request
from brim.runtime.api import Answer, Runtime


async def submit_all(runtime: Runtime, requests: Sequence[Request]) -> Answer:
    """One answer to all requests; choices are numbered through, prompt by prompt.

    Raises:
        BrimError: The first request that was decided was refused; none is left running.
    """
    if len(requests) == 1:
        return await runtime.submit(requests[0])
    merged = MergedAnswer(runtime, requests)
    try:
        await merged.admitted()
    except BaseException:
        merged.cancel()
        raise
    return merged


class MergedAnswer:
    """Implements `runtime.api.Answer` over several requests.

    Each prompt is submitted and read by its own task from the start, so that a prompt that has to
    wait for memory can wait for the others to end.  A refusal after the first admission is raised
    while iterating.  The tasks hand batches over through a queue of one: a slow reader makes the
    runtime coalesce, not this.
    """

    def __init__(self, runtime: Runtime, requests: Sequence[Request]) -> None:
        self._runtime = runtime
        self._admitted: list[Answer] = []
        self._first: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._queue: asyncio.Queue[list[Delta] | BaseException | None] = asyncio.Queue(maxsize=1)
        self._tasks = [
            asyncio.create_task(self._read(request, number * request.num_choices))
            for number, request in enumerate(requests)
        ]

    async def admitted(self) -> None:
        """Wait until one of the requests was admitted, or refused.

        Raises:
            BrimError: It was refused.
        """
        first = await self._first
        self.num_prompt_tokens = first.num_prompt_tokens
        self.max_tokens = first.max_tokens
        self.plan: Plan = first.plan

    @property
    def instead_of(self) -> str | None:
        """As for the first request."""
        return self._admitted[0].instead_of

    @property
    def moved_lines(self) -> tuple[MovedLine, ...]:
        """None: prompts of completions have no turns in which such lines are known."""
        return ()

    @property
    def queue_place(self) -> int:
        """Of the last of the requests that were started so far."""
        return max(answer.queue_place for answer in self._admitted)

    @property
    def overflow(self) -> OverflowReport | None:
        """What was done to all prompts together, as far as they were started."""
        reports = [answer.overflow for answer in self._admitted if answer.overflow is not None]
        if len(reports) < 2:
            return reports[0] if reports else None
        return OverflowReport(
            policy=reports[0].policy,
            num_tokens_before=sum(each.num_tokens_before for each in reports),
            num_tokens_after=sum(each.num_tokens_after for each in reports),
            num_removed_tokens=sum(each.num_removed_tokens for each in reports),
            num_summary_tokens=sum(each.num_summary_tokens for each in reports),
        )

    async def _read(self, request: Request, offset: int) -> None:
        try:
            answer = await self._runtime.submit(request)
            self._admitted.append(answer)
            try:
                if not self._first.done():
                    self._first.set_result(answer)
                async for batch in answer:
                    await self._queue.put([_shifted(delta, offset) for delta in batch])
            finally:
                answer.cancel()
        except Exception as exc:
            if not self._first.done():
                self._first.set_exception(exc)
            else:
                await self._queue.put(exc)
        else:
            await self._queue.put(None)

    async def __aiter__(self) -> AsyncIterator[list[Delta]]:
        """Batches of all prompts as they come."""
        num_open = len(self._tasks)
        while num_open:
            item = await self._queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield item

    def cancel(self) -> None:
        """Stop every prompt; each task cancels its own answer."""
        for task in self._tasks:
            task.cancel()


def _shifted(delta: Delta, offset: int) -> Delta:
    return msgspec.structs.replace(delta, index=delta.index + offset) if offset else delta
