"""The `brim` object of a request, and what it makes of one: whose cache, how urgent, how long.

Namespaces decide who may reuse whose prompts: a client that finds one reused learns that somebody
has sent it.  So by default they are as private as the app, or as the API key of a client that is
none, which itself is never stored.
"""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from brim.core.app import App
from brim.core.request import OverflowPolicy, Priority
from brim.errors import InvalidRequest
from brim.server import limits
from brim.server.caller import Caller

SHARED_NAMESPACE = "shared"
"""No private one is spelt so: those begin with "app:", "key:" or "/", or are empty."""


class CacheChoice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whose prompts a request reuses and who reuses its own."""

    use: bool | None = None
    """False reads the whole prompt and keeps nothing of it."""
    namespace: (
        Annotated[
            str, Meta(min_length=1, max_length=64, pattern=rf"^[A-Za-z0-9._-]+{limits.STRING_END}")
        ]
        | None
    ) = None
    """A part of the key's own: requests with the same key and the same word share prompts."""
    share: bool | None = None
    """True takes the namespace that every client of the server may use."""


class BrimOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What brim takes beyond OpenAI's fields."""

    force: bool | None = None
    """Load the model although it does not fit, and run although other programs hold memory that the
    request may need; where the operator allows it (`models.allow_force`), and never beyond the KV
    pool."""
    priority: Priority | None = None
    """`background` waits for interactive requests, a minute at most beyond its turn."""
    overflow: OverflowPolicy | None = None
    """What becomes of the conversation where it has outgrown the window."""
    cache: CacheChoice | None = None
    keep_volatile_lines: bool | None = None
    """True leaves lines that change with every request where the client put them."""


def namespace_of(caller: Caller, choice: CacheChoice | None) -> str:
    """Whose KV a request may reuse, and whose it becomes.

    Args:
        caller: Who sent it.
        choice: What it asked for.

    Raises:
        InvalidRequest: It asks for the shared namespace and for one of its own.

    Example:
        >>> namespace_of(Caller(), None), namespace_of(Caller(), CacheChoice(namespace="mail"))
        ('', '/mail')
    """
    owner = caller.namespace
    if choice is None:
        return owner
    if choice.share:
        if choice.namespace is not None:
            raise InvalidRequest(
                "`brim.cache.share` is the namespace of all clients; leave `namespace` out",
                param="brim.cache.namespace",
            )
        return SHARED_NAMESPACE
    return owner if choice.namespace is None else f"{owner}/{choice.namespace}"


def request_fields(
    options: BrimOptions | None,
    *,
    caller: Caller,
    overflow: OverflowPolicy,
    pair: tuple[str, str] | None,
    is_flexible: bool,
) -> dict[str, Any]:
    """Fields of `core.request.Request` that the options and the caller decide.

    Args:
        options: The request's `brim` object.
        caller: Who sent it.
        overflow: The server's policy, where neither the request nor its app gives one.
        pair: As which its model is loaded, target and draft; None where it has no partner.
        is_flexible: Whether OpenAI's `service_tier` says that the request can wait.

    Raises:
        InvalidRequest: As `namespace_of`.
    """
    options, app = options or BrimOptions(), caller.app
    priority = options.priority or (Priority.BACKGROUND if is_flexible else Priority.INTERACTIVE)
    if app is not None and app.priority is Priority.BACKGROUND:
        priority = Priority.BACKGROUND
    usual = overflow if app is None or app.overflow is None else app.overflow
    namespace = namespace_of(caller, options.cache)
    return {
        "force": bool(options.force),
        "priority": priority,
        "overflow": options.overflow or usual,
        "cache_namespace": namespace,
        "use_cache": options.cache is None or options.cache.use is not False,
        "keep_volatile_lines": bool(options.keep_volatile_lines),
        "app": caller.app_name,
        "max_context_tokens": None if app is None else app.max_context_tokens,
        "accepts_draft": app is not None and app.accepts_draft_of(pair),
        "keeps_on_disk": not (namespace == SHARED_NAMESPACE and _has_write_budget(app)),
    }


def _has_write_budget(app: App | None) -> bool:
    # What is written to the shared namespace is counted as nobody's, which would be a way around.
    return app is not None and app.budgets.ssd_write_bytes is not None
