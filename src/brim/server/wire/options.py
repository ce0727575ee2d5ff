"""The `brim` object of a request, and what it makes of one: whose cache, how urgent, how long.

Namespaces decide who may reuse whose prompts: a client that finds one reused learns that somebody
has sent it.  So by default they are as private as the API key, which itself is never stored.
"""

import hashlib
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from brim.core.request import OverflowPolicy, Priority
from brim.errors import InvalidRequest
from brim.server import limits

SHARED_NAMESPACE = "shared"
"""No private one is spelt so: those begin with "key:" or "/", or are empty."""

_KEY_DIGITS = 32
"""Of the key's SHA-256 in hex: 128 bits, of which nobody finds two alike."""


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


def key_of(authorization: bytes | None) -> str:
    """The API key in an `Authorization` header; empty where there is none.

    Example:
        >>> key_of(b"Bearer sk-1"), key_of(b"bearer  sk-1 "), key_of(None)
        ('sk-1', 'sk-1', '')
    """
    text = (authorization or b"").decode("latin-1").strip()
    scheme, _, key = text.partition(" ")
    return key.strip() if scheme.lower() == "bearer" else text


def namespace_of(key: str, choice: CacheChoice | None) -> str:
    """Whose KV a request may reuse, and whose it becomes.

    Args:
        key: The API key that the client sent; empty for none.
        choice: What it asked for.

    Raises:
        InvalidRequest: It asks for the shared namespace and for one of its own.

    Example:
        >>> namespace_of("", None), namespace_of("", CacheChoice(namespace="mail"))
        ('', '/mail')
    """
    owner = ""
    if key:
        owner = f"key:{hashlib.sha256(key.encode()).hexdigest()[:_KEY_DIGITS]}"
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
    options: BrimOptions | None, *, key: str, overflow: OverflowPolicy, is_flexible: bool
) -> dict[str, Any]:
    """Fields of `core.request.Request` that the options decide.

    Args:
        options: The request's `brim` object.
        key: The API key that the client sent.
        overflow: The server's policy, where the request gives none.
        is_flexible: Whether OpenAI's `service_tier` says that the request can wait.

    Raises:
        InvalidRequest: As `namespace_of`.
    """
    options = options or BrimOptions()
    priority = Priority.BACKGROUND if is_flexible else Priority.INTERACTIVE
    return {
        "force": bool(options.force),
        "priority": options.priority or priority,
        "overflow": options.overflow or overflow,
        "cache_namespace": namespace_of(key, options.cache),
        "use_cache": options.cache is None or options.cache.use is not False,
        "keep_volatile_lines": bool(options.keep_volatile_lines),
    }
