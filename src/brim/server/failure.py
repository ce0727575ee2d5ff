"""Errors on the wire: OpenAI's shape, the class's status, and when to try again."""

import logging
import math
import re

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from brim.errors import (
    BrimError,
    ContextOverflow,
    InvalidRequest,
    NotFound,
    OverBudget,
    RateLimited,
    Unauthenticated,
)
from brim.server.connection import abort
from brim.server.wire.responses import ErrorBody, ErrorDetail
from brim.telemetry.trace import where

log = logging.getLogger("brim.server")

_CODES: dict[type[BrimError], str] = {
    ContextOverflow: "context_length_exceeded",
    Unauthenticated: "invalid_api_key",
    RateLimited: "rate_limit_exceeded",
    OverBudget: "insufficient_quota",
}
"""Where OpenAI has a word of its own; otherwise the class's name in snake case is the code."""

_OUR_FAULT = "brim failed on its own account; the server's log has the details"


def code_of(error: BrimError) -> str:
    """A stable word for programs to branch on.

    Example:
        >>> code_of(NotFound("no such model", param="model")), code_of(NotFound("no such route"))
        ('model_not_found', 'not_found')
    """
    if isinstance(error, NotFound) and error.param == "model":
        return "model_not_found"
    name = type(error).__name__
    return _CODES.get(type(error), re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower())


def error_json(error: BrimError) -> bytes:
    """The error object as JSON."""
    detail = ErrorDetail(
        message=error.message, type=error.openai_type, param=error.param, code=code_of(error)
    )
    return msgspec.json.encode(ErrorBody(detail))


def error_headers(error: BrimError) -> dict[str, str]:
    """`Retry-After` in whole seconds, where waiting helps, and what else a status wants."""
    headers = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, Unauthenticated):
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, OverBudget):
        # OpenAI's clients try each 429 again within seconds, unless they are told not to.
        headers["x-should-retry"] = "false"
    return headers


def error_response(error: BrimError) -> Response:
    """The response for an error that came before the first byte."""
    return Response(
        error_json(error),
        status_code=error.status,
        headers=error_headers(error),
        media_type="application/json",
    )


def internal(exc: BaseException) -> BrimError:
    """What the client is told of a bug here; the log has its place and nothing that was sent."""
    log.error("unexpected failure while answering a request: %s", where(exc))
    return BrimError(_OUR_FAULT)


async def on_brim_error(_: Request, exc: Exception) -> Response:
    """Starlette's handler for BrimError."""
    assert isinstance(exc, BrimError)  # registered for that class alone
    return error_response(exc)


async def on_http_error(request: Request, exc: Exception) -> Response:
    """Starlette's handler for unknown routes and methods."""
    assert isinstance(exc, HTTPException)  # registered for that class alone
    route = f"{request.method} {request.url.path}"
    if exc.status_code == 405:
        allowed = ", ".join(sorted((exc.headers or {}).get("Allow", "").split(", ")))
        error: BrimError = InvalidRequest(f"there is no {route[:200]}; use {allowed}")
    else:
        error = NotFound(f"there is no {route[:200]}; GET /openapi.json lists what there is")
    response = error_response(error)
    response.status_code = exc.status_code
    if exc.headers:
        response.headers.update(exc.headers)
    return response


class BugCatcher:
    """ASGI middleware that answers what nothing else caught, so that nobody else logs its message.

    Args:
        app: What may have bugs.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on; a bug before the first byte is a 500, later the connection ends."""
        is_started = False

        async def noted(message: Message) -> None:
            nonlocal is_started
            is_started = True
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception as exc:
            error = internal(exc)
            if is_started:
                abort(scope)
            else:
                await error_response(error)(scope, receive, send)
