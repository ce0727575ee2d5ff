"""What the gateway offers to servers and commands: the seam between HTTP and everything below.

`Gateway` (gateway.py) implements it with worker processes; of this package nothing above imports
more than this and `Gateway`'s constructor.
"""

from collections.abc import AsyncIterator
from enum import StrEnum
from typing import Protocol

import msgspec

from brim.core.answer import Delta, MovedLine, OverflowReport
from brim.core.memory import Footprint
from brim.core.plan import Plan
from brim.core.request import OverflowPolicy, Request
from brim.core.stance import Stance
from brim.ledger.entry import EntryLine, Statement
from brim.ledger.history import ForecastError
from brim.runtime.request_counts import RequestCounts
from brim.telemetry.event_log import EventLog
from brim.worker.protocol import Stats


class ModelState(StrEnum):
    """Where one model stands, as `brim ps` shows it."""

    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    QUARANTINED = "quarantined"
    UNLOADED = "unloaded"
    """Out of memory; its next request loads it."""
    STOPPED = "stopped"


class ModelStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One served model, for `/v1/models`, `/health` and `brim ps`."""

    name: str
    state: ModelState
    reason: str = ""
    """Why it is not ready, in words; for a quarantined model, what the deaths had in common."""
    created_unix_s: int = 0
    plan: Plan
    pid: int | None = None
    footprint: Footprint | None = None
    resident_bytes: int | None = None
    """Measured by the OS for the worker process, where it can tell."""
    load_s: float | None = None
    num_running: int = 0
    num_waiting: int = 0
    """Requests that wait for their turn in the worker's queue."""
    num_deaths: int = 0
    worker_stats: Stats | None = None
    """The worker's counters, a few seconds old at most while it is up."""
    requests: RequestCounts = RequestCounts()
    """What became of the requests that were sent to it."""
    overflow: OverflowPolicy = OverflowPolicy.REJECT
    """What becomes of conversations that outgrow the window, where a request does not say."""
    entry: EntryLine | None = None
    """What it costs the machine's account; None while it is out of memory."""
    forecast_errors: tuple[ForecastError, ...] = ()
    """What was planned and what was measured of this load, for each term."""
    kv_pool_tokens: int = 0
    """Cells that its pool has now, at most `plan.kv_tokens`; 0 while it is out of memory."""
    kv_used_tokens: int = 0
    """Cells that running requests hold or were promised, a few seconds old at most."""
    idle_s: float | None = None
    """Since its last request ended; None while it has one, or is out of memory."""
    leaves_in_s: float | None = None
    """When idleness will take it out of memory; None where that will not happen."""
    stays: str = ""
    """Why it does not leave for idleness, while it is in memory: 'in use', 'pinned by ...'."""
    num_waiting_load: int = 0
    """Requests that wait for it to be loaded, or for its turn."""
    load_progress: float | None = None
    """0 to 1 while it is being loaded; None otherwise."""
    load_eta_s: float | None = None
    """Seconds until it is loaded, by its progress so far."""
    pair: tuple[str, str] | None = None
    """(target, draft) where it is one of two models that are loaded and leave together."""


class Answer(Protocol):
    """One admitted request.  Iterate it to the end, or cancel it; either releases its grant."""

    num_prompt_tokens: int
    max_tokens: int
    """Bound of each choice, after the window and the answer bound were applied."""
    plan: Plan

    @property
    def instead_of(self) -> str | None:
        """The model that was asked for, where its smaller partner answers in its place."""
        ...

    @property
    def queue_place(self) -> int:
        """Where it stood in its model's queue when it was started: 0 ran at once, 1 was next."""
        ...

    @property
    def overflow(self) -> OverflowReport | None:
        """What was done to its prompt to make it fit the window, where something was."""
        ...

    @property
    def moved_lines(self) -> tuple[MovedLine, ...]:
        """Lines of it that do not stand where the client put them, so that its prefix is found."""
        ...

    def __aiter__(self) -> AsyncIterator[list[Delta]]:
        """Batches of deltas; whatever arrived while the consumer was busy comes as one batch.

        Every choice ends with exactly one delta that has a `finish_reason`; a worker's death gives
        FinishReason.ERROR with the error.
        """
        ...

    def cancel(self) -> None:
        """Stop generating; safe at any time and more than once."""
        ...


class Runtime(Protocol):
    """Admits requests and tells about models."""

    @property
    def event_log(self) -> EventLog:
        """What happened to models and to what is allowed, for people and apps."""
        ...

    def stance(self) -> Stance:
        """What is allowed at the moment; everything where nothing governs."""
        ...

    def load_progress(self, model: str) -> float | None:
        """How far the load of a model is, 0 to 1, where requests wait for it; None where none is.

        0 while it waits for its turn.
        """
        ...

    def models(self) -> list[ModelStatus]:
        """All served models, in the order they were given."""
        ...

    def statement(self) -> Statement | None:
        """The account of the machine's memory; None while nothing was asked of it yet."""
        ...

    def is_draining(self) -> bool:
        """Whether new requests are refused because the server is shutting down."""
        ...

    async def submit(self, request: Request) -> Answer:
        """Count, admit and start a request.

        Raises:
            NotFound: No such model is served.
            ContextOverflow: Prompt and max_tokens are over the window; the message has the numbers.
            InvalidRequest: The template or the tokenizer refused the prompt, or prompt and answers
                are more than the whole KV pool.
            Busy: Draining, restarting, queue full, or no room for the model or the request now;
                `retry_after_s` is set.
            DoesNotFit: The model was out of memory and has no room.
            RateLimited: Its app has as many requests in work, in this minute or in this pool as it
                may.
            OverBudget: Its app has used up what it may in a day.
            Unauthorized: The request is forced and the operator does not allow that.
            EngineError: The model is quarantined or the worker failed.
        """
        ...
