"""One app that may use the server: what its manifest grants, without its key."""

import msgspec

from brim.core.request import OverflowPolicy, Priority


class Budgets(msgspec.Struct, frozen=True, kw_only=True):
    """What an app may use in one day, in UTC; None is no bound."""

    tokens: int | None = None
    """Read and written."""
    energy_j: float | None = None
    """Where the machine can tell."""
    ssd_write_bytes: int | None = None
    """Of the prefix cache.  Beyond it, prompts are kept in memory alone; nothing is refused."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What an app may do at once; None is no bound."""

    requests_per_minute: int | None = None
    max_concurrent: int | None = None
    memory_share: float = 1.0
    """Of each model's KV pool, that its requests may hold together."""


class App(msgspec.Struct, frozen=True, kw_only=True):
    """An app as the server knows it."""

    name: str
    priority: Priority = Priority.INTERACTIVE
    """The best that its requests may ask for."""
    models: tuple[str, ...] = ()
    """That it may use; empty for all."""
    overflow: OverflowPolicy | None = None
    """Where a request does not say; None leaves it to the server."""
    max_context_tokens: int | None = None
    accepts_draft: bool = False
    """Whether the smaller model of a pair may answer where power is short."""
    keep_loaded: bool = False
    """Whether its models are pinned while it is known."""
    budgets: Budgets = Budgets()
    limits: Limits = Limits()

    def may_use(self, model: str) -> bool:
        """Whether a model was granted to it."""
        return not self.models or model in self.models
