"""The ASGI app: routes over a runtime, the guard before them, errors in one shape."""

from collections.abc import Collection

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Route

from brim.errors import BrimError
from brim.runtime.api import Runtime
from brim.server.failure import on_brim_error, on_bug, on_http_error
from brim.server.guard import LOOPBACK_HOSTS, BrowserGuard
from brim.server.limits import MAX_BODY_BYTES
from brim.server.routes.completions import CHAT, PLAIN, CompletionsEndpoint
from brim.server.routes.description import DescriptionRoute
from brim.server.routes.metrics import MetricsRoute
from brim.server.routes.models import ModelRoutes
from brim.server.routes.status import StatusRoutes
from brim.server.stream import HEARTBEAT_S


def build_app(
    runtime: Runtime,
    *,
    allowed_hosts: Collection[str] | None = LOOPBACK_HOSTS,
    allowed_origins: Collection[str] = (),
    max_body_bytes: int = MAX_BODY_BYTES,
    heartbeat_s: float = HEARTBEAT_S,
) -> Starlette:
    """The HTTP interface of `runtime`.

    Args:
        runtime: Admits requests and tells about models; its lifetime is the caller's business.
        allowed_hosts: Names that clients may call this server by; `guard.served_hosts` gives
            them for the address it is bound to.  None allows every name.
        allowed_origins: Web origins that may use it from a browser, besides this machine's.
        max_body_bytes: Longer request bodies are answered with 413.
        heartbeat_s: Seconds between comments while a stream has nothing to say yet.
    """
    models, status = ModelRoutes(runtime), StatusRoutes(runtime)
    chat = CompletionsEndpoint(
        runtime, CHAT, max_body_bytes=max_body_bytes, heartbeat_s=heartbeat_s
    )
    plain = CompletionsEndpoint(
        runtime, PLAIN, max_body_bytes=max_body_bytes, heartbeat_s=heartbeat_s
    )
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/completions", plain, methods=["POST"]),
            Route("/v1/models", models.list),
            Route("/v1/models/{model:path}", models.get),
            Route("/health", status.health),
            Route("/brim/ps", status.ps),
            Route("/brim/ledger", status.ledger),
            Route("/metrics", MetricsRoute(runtime).get),
            Route("/openapi.json", DescriptionRoute(runtime).get),
        ],
        middleware=[
            Middleware(BrowserGuard, allowed_hosts=allowed_hosts, allowed_origins=allowed_origins)
        ],
        exception_handlers={
            BrimError: on_brim_error,
            HTTPException: on_http_error,
            Exception: on_bug,
        },
    )
    # A redirect from /v1/models/ would be answered in Starlette's shape; an unknown route is 404.
    app.router.redirect_slashes = False
    return app
