"""What a client asks for, after validation and before any tokens exist."""

from enum import StrEnum
from typing import Any

import msgspec

from brim.core.sampling import SamplingParams


class Priority(StrEnum):
    """Who goes first where not everything can be done at once."""

    INTERACTIVE = "interactive"
    """Someone waits for the answer."""
    BACKGROUND = "background"


class OverflowPolicy(StrEnum):
    """What becomes of a conversation that outgrows the window."""

    REJECT = "reject"
    """It is refused, with the numbers."""
    TRIM = "trim"
    """The oldest turns are left out; the system prompt and the newest stay."""
    SHIFT = "shift"
    """The first tokens stay and the oldest behind them go, also while the answer grows."""
    SUMMARIZE = "summarize"
    """The oldest turns are replaced by a summary that the model writes."""


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A function that the model asked for in an earlier turn."""

    name: str
    arguments: str = ""
    """JSON of an object as the model wrote it; kept as text so that keys and numbers stay as they
    were."""
    id: str | None = None


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One turn of a conversation."""

    role: str
    content: str
    name: str | None = None
    reasoning: str | None = None
    """What the model thought before it answered; templates show or drop it."""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    """Of the call that a tool's result answers."""


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One accepted request: exactly one of `messages`, `prompt` and `prompt_tokens` is given."""

    request_id: str
    model: str
    messages: tuple[Message, ...] | None = None
    """Rendered with the model's chat template in the worker."""
    prompt: str | None = None
    """Completed as it is; special tokens in it are text unless the model's own begin token."""
    prompt_tokens: tuple[int, ...] | None = None
    max_tokens: int | None = None
    """None: up to the server's answer bound or the end of the window, whichever comes first."""
    num_choices: int = 1
    stop: tuple[str, ...] = ()
    sampling: SamplingParams = SamplingParams()
    template_variables: dict[str, Any] = {}
    """Extra variables for the chat template, as in `chat_template_kwargs`."""
    priority: Priority = Priority.INTERACTIVE
    overflow: OverflowPolicy = OverflowPolicy.REJECT
    cache_namespace: str = ""
    """Whose KV it may reuse and whose it becomes: requests of one namespace share prefixes."""
    use_cache: bool = True
    """False: read the whole prompt, and keep nothing of it."""
    keep_volatile_lines: bool = False
    """True: leave lines that change with every request (`chat.volatile`) where the client put
    them."""
    app: str = ""
    """Whose it is; empty for nobody's in particular."""
    max_context_tokens: int | None = None
    """Longest prompt plus answer that it may have, where that is less than the model's window."""
    accepts_draft: bool = False
    """Whether the smaller model of its pair may answer it where power is short."""
    keeps_on_disk: bool = True
    """False: its prefixes may be reused from memory and read from disk, and are not written."""
    force: bool = False
    """Load its model although it does not fit, and run although other programs hold memory that it
    may need; never beyond the KV pool."""
