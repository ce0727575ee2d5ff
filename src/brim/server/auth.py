"""Who asks, and which routes are theirs: keys of apps, the operator's token, and nobody.

On loopback a server is open to this machine's programs, as long as its settings do not require
keys: a request without a key, or with one that is not of brim's form (OpenAI's clients always send
some), is nobody's in particular.  Everywhere else each request needs the key of an app.  Routes
that tell about the whole server are the operator's, who has the token in the server's own state
file; an app never sees them.
"""

import hmac
from collections.abc import Callable
from enum import Enum

from starlette.types import ASGIApp, Receive, Scope, Send

from brim.apps.registry import KEY_PREFIX
from brim.core.app import App
from brim.errors import BrimError, ConfigError, Unauthenticated, Unauthorized
from brim.server.caller import NOBODY, Caller, set_caller
from brim.server.failure import error_response
from brim.server.guard import is_loopback

_HOW_TO_GET_A_KEY = "ask its operator for one (brim apps add), and send it as the API key"


class Audience(Enum):
    """Whom a route is for."""

    EVERYBODY = "everybody"
    CLIENTS = "clients"
    """Apps, the operator, and nobody in particular where no key is required."""
    OPERATOR = "operator"


_WANTED = {
    Audience.EVERYBODY: "this server wants a key",
    Audience.CLIENTS: f"this server wants the key of an app; {_HOW_TO_GET_A_KEY}",
    Audience.OPERATOR: "this is for the server's operator, whose token is in the server's state "
    "file; brim's own commands on that machine (brim ps, brim events) send it",
}

_AUDIENCES = {
    "/health": Audience.EVERYBODY,
    "/brim/ps": Audience.OPERATOR,
    "/brim/ledger": Audience.OPERATOR,
    "/brim/stance": Audience.OPERATOR,
    "/brim/events": Audience.OPERATOR,
    "/metrics": Audience.OPERATOR,
}
"""Every other path, those that do not exist included, is for clients."""


def _audience_of(path: str) -> Audience:
    # The router's patterns end in `$`, which also matches before a last line feed: "/brim/ps%0A"
    # leads to the route of "/brim/ps".
    return _AUDIENCES.get(path.removesuffix("\n"), Audience.CLIENTS)


class Doorkeeper:
    """Tells callers apart.

    Args:
        authenticate: The app that a key belongs to; None for a key that no app has.  It compares
            in constant time.
        requires_key: Whether nobody in particular is let in.
        operator_token: What the operator's own commands send; empty for none.
    """

    def __init__(
        self,
        authenticate: Callable[[str], App | None],
        *,
        requires_key: bool,
        operator_token: str = "",
    ) -> None:
        self._authenticate = authenticate
        self._requires_key = requires_key
        self._operator_token = operator_token.encode()

    def admit(self, scope: Scope, audience: Audience) -> Caller:
        """Who sent a request, where the route is for it.

        Raises:
            Unauthenticated: The key is no app's, or there is none where one is required.
            Unauthorized: It is an app, and the route is the operator's.
        """
        caller = self._identify(_keys(scope))
        if audience is Audience.OPERATOR and caller.app is not None:
            raise Unauthorized(
                "this tells about every app and model, so it is for the server's operator alone; "
                "an app asks /v1/models, /brim/v1/usage and /brim/v1/events"
            )
        if self._requires_key and caller.app is None and not caller.is_operator:
            raise Unauthenticated(_WANTED[audience])
        return caller

    def _identify(self, keys: list[str]) -> Caller:
        for key in keys:
            if self._is_operators(key):
                return Caller(is_operator=True)
        for key in keys:
            if key.startswith(KEY_PREFIX):  # an app's or nobody's: unknown ones are no strangers
                app = self._authenticate(key)
                if app is None:
                    raise Unauthenticated(f"no app has this key; {_HOW_TO_GET_A_KEY}")
                return Caller(app=app)
        return Caller(key=keys[0]) if keys else NOBODY

    def _is_operators(self, key: str) -> bool:
        token = self._operator_token
        return bool(token) and hmac.compare_digest(key.encode(), token)


def open_doorkeeper() -> Doorkeeper:
    """One that knows no app and lets everybody in, for a server of one's own on loopback."""
    return Doorkeeper(lambda key: None, requires_key=False)


class Gate:
    """ASGI middleware that asks a doorkeeper, and leaves word of who it was in the scope.

    Args:
        app: What is guarded.
        doorkeeper: Who tells callers apart.
    """

    def __init__(self, app: ASGIApp, *, doorkeeper: Doorkeeper) -> None:
        self._app = app
        self._doorkeeper = doorkeeper

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it with 401 or 403."""
        if scope["type"] == "http":
            audience = _audience_of(scope["path"])
            try:
                caller = self._doorkeeper.admit(scope, audience)
            except BrimError as refusal:
                if audience is not Audience.EVERYBODY:
                    await error_response(refusal)(scope, receive, send)
                    return
            else:
                set_caller(scope, caller)
        await self._app(scope, receive, send)


def requires_keys(bound_address: str, setting: bool) -> bool:
    """Whether a server on this address asks everybody for a key.

    Args:
        bound_address: The one that the socket has, from `getsockname`.
        setting: `server.require_keys`.

    Example:
        >>> requires_keys("127.0.0.1", False), requires_keys("0.0.0.0", False)
        (False, True)
    """
    return setting or not is_loopback(bound_address)


def check_exposed(bound_address: str, has_apps: bool) -> None:
    """Refuse to listen where other machines reach a server that nobody could use.

    Args:
        bound_address: The one that the socket has, from `getsockname`.
        has_apps: Whether any app is known.

    Raises:
        ConfigError: There is none, and the address is not loopback.
    """
    if not has_apps and not is_loopback(bound_address):
        raise ConfigError(
            f"other machines reach {bound_address}, so every request needs the key of an app, and "
            "no app is known: add one first with `brim apps add FILE`, or listen on 127.0.0.1",
            param="server.host",
        )


def _keys(scope: Scope) -> list[str]:
    """What came as a key: `Authorization` (OpenAI's clients), `X-Api-Key` (Anthropic's)."""
    headers = dict(scope["headers"])
    sent = (bearer(headers.get(b"authorization")), headers.get(b"x-api-key", b"").strip())
    return [each.decode("latin-1") for each in sent if each]


def bearer(authorization: bytes | None) -> bytes:
    """The key in an `Authorization` header, with or without its scheme; empty where there is none.

    Example:
        >>> bearer(b"Bearer sk-1"), bearer(b"bearer  sk-1 "), bearer(b"sk-1"), bearer(None)
        (b'sk-1', b'sk-1', b'sk-1', b'')
    """
    text = (authorization or b"").strip()
    scheme, _, key = text.partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else text
