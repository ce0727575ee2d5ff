"""The ASGI app: routes over a runtime, the guards before them, errors in one shape."""

import asyncio
from collections.abc import Collection

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Route

from brim.errors import BrimError
from brim.runtime.api import Runtime
from brim.server.auth import Doorkeeper, Gate, open_doorkeeper
from brim.server.failure import BugCatcher, on_brim_error, on_http_error
from brim.server.guard import LOOPBACK_HOSTS, BrowserGuard
from brim.server.limits import MAX_BODY_BYTES, MAX_LARGE_BODIES
from brim.server.routes.completions import CHAT, PLAIN, Bounds, CompletionsEndpoint
from brim.server.routes.description import DescriptionRoute
from brim.server.routes.events import EventRoutes
from brim.server.routes.metrics import MetricsRoute
from brim.server.routes.models import ModelRoutes
from brim.server.routes.status import StatusRoutes
from brim.server.routes.usage import UsageRoute, UsageSource
from brim.server.stream import HEARTBEAT_S


def build_app(
    runtime: Runtime,
    *,
    doorkeeper: Doorkeeper | None = None,
    usage: UsageSource | None = None,
    allowed_hosts: Collection[str] | None = LOOPBACK_HOSTS,
    allowed_origins: Collection[str] = (),
    max_body_bytes: int = MAX_BODY_BYTES,
    heartbeat_s: float = HEARTBEAT_S,
) -> Starlette:
    """The HTTP interface of `runtime`.

    Args:
        runtime: Admits requests and tells about models; its lifetime is the caller's business.
        doorkeeper: Tells apps and the operator apart; None knows neither and lets everybody in.
        usage: Where apps' usage is looked up: the gateway's meter.
        allowed_hosts: Names that clients may call this server by; `guard.served_hosts` gives
            them for the address it is bound to.  None allows every name.
        allowed_origins: Web origins that may use it from a browser, besides this machine's.
        max_body_bytes: Longer request bodies are answered with 413.
        heartbeat_s: Seconds between comments while a stream has nothing to say yet.
    """
    doorkeeper = open_doorkeeper() if doorkeeper is None else doorkeeper
    models, status = ModelRoutes(runtime), StatusRoutes(runtime)
    events = EventRoutes(runtime, doorkeeper, heartbeat_s=heartbeat_s)
    bounds = Bounds(
        max_body_bytes=max_body_bytes,
        heartbeat_s=heartbeat_s,
        large_bodies=asyncio.Semaphore(MAX_LARGE_BODIES),
    )
    chat = CompletionsEndpoint(runtime, CHAT, bounds, usage)
    plain = CompletionsEndpoint(runtime, PLAIN, bounds, usage)
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/completions", plain, methods=["POST"]),
            Route("/v1/models", models.list),
            Route("/v1/models/{model:path}", models.get),
            Route("/health", status.health),
            Route("/brim/ps", status.ps),
            Route("/brim/ledger", status.ledger),
            Route("/brim/stance", status.stance),
            Route("/brim/events", events.for_operator),
            Route("/brim/v1/usage", UsageRoute(usage).get),
            Route("/brim/v1/events", events.for_app),
            Route("/metrics", MetricsRoute(runtime).get),
            Route("/openapi.json", DescriptionRoute(runtime).get),
        ],
        middleware=[
            Middleware(BrowserGuard, allowed_hosts=allowed_hosts, allowed_origins=allowed_origins),
            # Behind it: browsers ask whether they may send a key before they send one.
            Middleware(Gate, doorkeeper=doorkeeper),
            Middleware(BugCatcher),
        ],
        exception_handlers={
            BrimError: on_brim_error,
            HTTPException: on_http_error,
        },
    )
    # A redirect from /v1/models/ would be answered in Starlette's shape; an unknown route is 404.
    app.router.redirect_slashes = False
    return app
