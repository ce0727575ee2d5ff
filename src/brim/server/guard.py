"""Keeps web pages in a browser on this machine away from the server.

A page from anywhere can make its reader's browser send requests to 127.0.0.1.  Two headers give it
away: `Host`, when a name of the attacker's was pointed at this machine (DNS rebinding), and
`Origin`, which browsers set on every request from another site that could change something.
Programs that are no browsers send no `Origin` and a true `Host`.
"""

import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from brim.errors import BrimError, Unauthorized
from brim.server.failure import error_response

LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})


class BrowserGuard:
    """ASGI middleware that refuses requests by `Host` and `Origin`.

    Args:
        app: What is guarded.
        allowed_hosts: Names that clients may use for this server; None allows every name, for a
            server that other machines reach.
        allowed_origins: Origins (`https://app.example`) allowed besides the server's own.
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
        """Pass the request on, or refuse it with 403."""
        if scope["type"] == "http":
            refusal = self._refusal(scope)
            if refusal is not None:
                await error_response(refusal)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> BrimError | None:
        headers = dict(scope["headers"])
        host = _host_name("//" + headers.get(b"host", b"").decode("latin-1"))
        if b"host" in headers and self._hosts is not None and not _is_among(host, self._hosts):
            return Unauthorized(
                f"this server does not answer to the name '{host[:100]}'; use 127.0.0.1, or add "
                f"the name to server.allowed_hosts"
            )
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        if not origin or origin in self._origins:
            return None
        page = _host_name(origin)
        if page and (page == host if self._hosts is None else _is_among(page, self._hosts)):
            return None
        return Unauthorized(
            f"web pages from '{origin[:100]}' may not use this server; call it from a program or "
            f"a page of this machine, or add the origin to server.allowed_origins"
        )


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
    if not _is_loopback(bound_address) and not also:
        return None
    return LOOPBACK_HOSTS | {_canonical(host) for host in (bind_host, bound_address, *also)}


def _is_loopback(address: str) -> bool:
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
