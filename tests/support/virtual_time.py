"""An event loop whose clock jumps to the next timer when nothing else is to be done.

Minutes of a scenario take milliseconds, and the same things happen in the same order each time.
Threads and sockets have no place in it: their time is real.
"""

import asyncio
import selectors
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


class _Jumping(selectors.SelectSelector):
    """Asks what is ready; where nothing is, the time that it would have waited has passed."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "everything waits for something that no timer brings"
            self.now_s += timeout
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """See the module."""

    def __init__(self) -> None:
        self._jumping = _Jumping()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now_s


def run_virtually(main: Awaitable[T]) -> T:
    """What `main` returns, in no time."""

    async def awaited() -> T:
        return await main

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(awaited())
