"""Who does what the governor decides: the runtime, or a description of one in tests."""

from typing import Protocol

from brim.core.stance import Stance
from brim.governor.readings import ModelReading


class Actuator(Protocol):
    """Does what the governor decides; on the event loop's thread."""

    def models(self) -> tuple[ModelReading, ...]:
        """Every known model as it stands; reads nothing that takes time."""
        ...

    async def set_stance(self, stance: Stance) -> None:
        """Have it hold for admission and loads, and its limits for every worker."""
        ...

    async def drop_idle_kv(self, model: str) -> int:
        """Shrink a model's pool to what runs; the tokens of idle sequences that went."""
        ...

    async def grow_kv(self, model: str) -> None:
        """Give a model the pool that its plan says."""
        ...

    async def unload(self, model: str, cause: str) -> bool:
        """Take a model out of memory; False where it has something in flight by now.

        Called again where its memory did not come back: by harder means then.
        """
        ...

    async def measure(self, model: str) -> int:
        """Bytes that a model's process holds now; 0 where there is none."""
        ...
