"""One admitted request on the gateway's side: what has arrived, and who is still owed what."""

import asyncio
from collections.abc import AsyncIterator, Callable

from brim.core.answer import Delta, ErrorInfo, FinishReason, MovedLine, OverflowReport
from brim.core.plan import Plan
from brim.errors import BrimError
from brim.worker.deltas import DeltaBuffer


class StreamedAnswer:
    """Implements `runtime.api.Answer`; deltas that nobody fetches are merged, not queued.

    Args:
        ticket: The worker's number for it.
        num_prompt_tokens: Length of the prompt.
        max_tokens: Bound of each choice.
        num_choices: How many endings are owed.
        plan: How the model is loaded.
        queue_place: Where it stood in the queue when it was started.
        overflow: What was done to its prompt to make it fit.
        moved_lines: Lines of it that do not stand where the client put them.
        instead_of: The model that was asked for, where that is another one.
        on_cancel: Called when the client gives up before the end.
    """

    def __init__(
        self,
        ticket: int,
        *,
        num_prompt_tokens: int,
        max_tokens: int,
        num_choices: int,
        plan: Plan,
        on_cancel: Callable[[int], None],
        queue_place: int = 0,
        overflow: OverflowReport | None = None,
        moved_lines: tuple[MovedLine, ...] = (),
        instead_of: str | None = None,
    ) -> None:
        self.ticket = ticket
        self.num_prompt_tokens = num_prompt_tokens
        self.max_tokens = max_tokens
        self.plan = plan
        self.queue_place = queue_place
        self.overflow = overflow
        self.moved_lines = moved_lines
        self.instead_of = instead_of
        self._on_cancel = on_cancel
        self._owed = set(range(num_choices))
        self._arrived = DeltaBuffer()
        self._wake = asyncio.Event()

    @property
    def is_ended(self) -> bool:
        """Whether every choice has had its last delta."""
        return not self._owed

    def push(self, delta: Delta) -> None:
        """Take a delta from the worker; one for a choice that has ended is dropped."""
        if delta.index not in self._owed:
            return
        if delta.finish_reason is not None:
            self._owed.remove(delta.index)
        self._arrived.add(((self.ticket, delta),))
        self._wake.set()

    def end(self, reason: FinishReason, error: BrimError | None = None) -> None:
        """End every choice that is still owed something."""
        info = None if error is None else ErrorInfo.of(error)
        for index in sorted(self._owed):
            self.push(Delta(index=index, finish_reason=reason, error=info))

    def cancel(self) -> None:
        """Stop generating; safe at any time and more than once."""
        if not self.is_ended:
            self._on_cancel(self.ticket)

    async def __aiter__(self) -> AsyncIterator[list[Delta]]:
        """Batches of deltas to the end; leaving the loop early cancels."""
        try:
            while True:
                if self._arrived:
                    yield [delta for _, delta in self._arrived.take()]
                elif self.is_ended:
                    return
                else:
                    self._wake.clear()
                    await self._wake.wait()
        finally:
            self.cancel()
