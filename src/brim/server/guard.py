"""Keeps web pages in a browser on this machine away from the server.

A page from anywhere can make its reader's browser send requests to 127.0.0.1.  Two headers give it
away: `Host`, when a name of the attacker's was pointed at this machine (DNS rebinding), and
`Origin`, which browsers set on every request from another site that could change something.
Programs that are no browsers send no `Origin` and a true `Host`.
"""

import ipaddress
import re
from collections.abc import Collection, Mapping
from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from brim.errors import BrimError, Unauthorized
from brim.server.failure import error_response

LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})

PREFLIGHT_S = 600
"""How long a browser need not ask again; Chrome remembers for two hours at most, Safari for ten
minutes."""

_METHODS = "GET, POST"
_EXPOSED = (
    "retry-after, x-request-id, x-should-retry, x-brim-request-id, x-brim-model, x-brim-engine, "
    "x-brim-quant, x-brim-context-tokens, x-brim-max-tokens, x-brim-queue-place, "
    "x-brim-trimmed-tokens, x-brim-cache, x-brim-cached-tokens, x-brim-cache-reason, "
    "x-brim-instead-of, x-brim-budget-tokens-left"
)
"""Headers that a page may read, beside the few that every page may."""

_HEADER_NAMES = re.compile(rb"[A-Za-z0-9-]+( *, *[A-Za-z0-9-]+)*")
_MAX_HEADER_NAMES_BYTES = 2048
"""OpenAI's client sends a dozen headers of its own."""


class BrowserGuard:
    """ASGI middleware that refuses requests by `Host` and `Origin`, and answers browsers' CORS.

    Pages of the allowed origins may read answers; those of this machine's own pages pass, and what
    is answered is the browser's to keep from them.  No wildcard, and no credentials: keys travel in
    a header that a page sets itself.

    Args:
        app: What is guarded.
        allowed_hosts: Names that clients may use for this server; None allows every name, for a
            server that other machines reach.
        allowed_origins: Origins (`https://app.example`) whose pages may use the server.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        allowed_hosts: Collection[str] | None,
        allowed_origins: Collection[str] = (),
    ) -> None:
        self._app = app
        self._hosts = (
            None if allowed_hosts is None else {_canonical(host) for host in allowed_hosts}
        )
        self._origins = {origin.lower() for origin in allowed_origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, answer a preflight, or refuse with 403."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        origin = headers.get(b"origin", b"").decode("latin-1")
        if self._origins:
            send = _with_cors(send, origin if origin.lower() in self._origins else None)
        refusal = self._refusal(headers, origin.lower())
        if refusal is not None:
            await error_response(refusal)(scope, receive, send)
        elif (
            scope["method"] == "OPTIONS"
            and origin.lower() in self._origins
            and b"access-control-request-method" in headers
        ):
            await _preflight(headers)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, headers: Mapping[bytes, bytes], origin: str) -> BrimError | None:
        host = _host_name("//" + headers.get(b"host", b"").decode("latin-1"))
        if b"host" in headers and self._hosts is not None and not _is_among(host, self._hosts):
            return Unauthorized(
                f"this server does not answer to the name '{host[:100]}'; use 127.0.0.1, or add "
                f"the name to server.allowed_hosts"
            )
        if not origin or origin in self._origins:
            return None
        page = _host_name(origin)
        if page and (page == host if self._hosts is None else _is_among(page, self._hosts)):
            return None
        return Unauthorized(
            f"web pages from '{origin[:100]}' may not use this server; call it from a program or "
            f"a page of this machine, or add the origin to server.allowed_origins"
        )


def _with_cors(send: Send, origin: str | None) -> Send:
    """Name the origin whose page may read the answer, where there is one."""

    async def marked(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=message.setdefault("headers", []))
            # Also where no origin is named: a cache must not give the answer to another page.
            headers.add_vary_header("Origin")
            if origin is not None:
                headers["access-control-allow-origin"] = origin
                headers["access-control-expose-headers"] = _EXPOSED
        await send(message)

    return marked


def _preflight(headers: Mapping[bytes, bytes]) -> Response:
    """What a browser asks before it lets an allowed page send JSON or a key."""
    answer = {
        "access-control-allow-methods": _METHODS,
        "access-control-max-age": str(PREFLIGHT_S),
    }
    names = headers.get(b"access-control-request-headers", b"").strip()
    if len(names) <= _MAX_HEADER_NAMES_BYTES and _HEADER_NAMES.fullmatch(names):
        answer["access-control-allow-headers"] = names.decode()
    if headers.get(b"access-control-request-private-network") == b"true":
        # Chrome asks whether a page of the internet may reach an address of this machine.
        answer["access-control-allow-private-network"] = "true"
    return Response(status_code=204, headers=answer)


def served_hosts(
    bind_host: str, bound_address: str, also: Collection[str] = ()
) -> frozenset[str] | None:
    """What `allowed_hosts` should be for a server; None, which allows every name, as rarely.

    What counts is the address: "Localhost", "::ffff:127.0.0.1" and often the machine's own name
    are loopback too.

    Args:
        bind_host: The name or address that the operator gave.
        bound_address: The one that the socket has, from `getsockname`.
        also: Names that the operator allows besides; with any, all others are refused even on an
            address that other machines reach.

    Example:
        >>> sorted(served_hosts("LOCALHOST", "127.0.0.1") or ()), served_hosts("", "0.0.0.0")
        (['127.0.0.1', '::1', 'localhost'], None)
    """
    if not is_loopback(bound_address) and not also:
        return None
    return LOOPBACK_HOSTS | {_canonical(host) for host in (bind_host, bound_address, *also)}


def is_loopback(address: str) -> bool:
    """Whether this machine alone reaches an address.

    Example:
        >>> is_loopback("127.0.1.1"), is_loopback("::ffff:127.0.0.1"), is_loopback("::")
        (True, True, False)
    """
    ip = ipaddress.ip_address(address)
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


def _canonical(host: str) -> str:
    """One spelling for each name or address."""
    host = host.lower().rstrip(".")
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return host
    return str(getattr(ip, "ipv4_mapped", None) or ip)


def _host_name(url: str) -> str:
    """The host of a URL, without port and brackets; empty where it has none."""
    try:
        return _canonical(urlsplit(url).hostname or "")
    except ValueError:
        return ""


def _is_among(host: str, allowed: Collection[str]) -> bool:
    # Browsers resolve every name below .localhost to this machine and to nothing else.
    return host in allowed or ("localhost" in allowed and host.endswith(".localhost"))
