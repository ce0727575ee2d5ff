"""What a model asks of whoever looks after its place in memory, and what leaving it gave back."""

from typing import TYPE_CHECKING, Protocol

import msgspec

from brim.core.stance import Stance

if TYPE_CHECKING:
    from brim.runtime.model_host import ModelHost


class Seat(Protocol):
    """The model's place in memory, as the gateway looks after it."""

    def stance(self) -> Stance:
        """What is allowed at the moment."""
        ...

    async def enter(self, host: "ModelHost", *, force: bool) -> None:
        """Return when the model is in memory and takes requests; the request counts as in flight.

        Whoever returns from it calls `ModelHost.leave`.

        Args:
            host: The model.
            force: Load it even where it does not fit.

        Raises:
            BrimError: It cannot be now, or not at all.
        """
        ...

    async def grow(self, host: "ModelHost", kv_tokens: int) -> None:
        """Have the model's pool hold at least so many cells.

        Raises:
            Busy: There is no room for that now.
        """
        ...

    def short_of_growth(self, name: str, num_kv_tokens: int) -> int:
        """Bytes that a request could still make the model take and that are not free any more."""
        ...


class Unloaded(msgspec.Struct, frozen=True, kw_only=True):
    """What an unload gave back, by the system's account of the process."""

    before_bytes: int
    after_bytes: int
    """0 where the process is gone; until then it is not unloaded."""
    took_s: float
