"""Errors on the wire: OpenAI's shape, the class's status, and when to try again."""

import logging
import math
import re

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from brim.errors import BrimError, ContextOverflow, InvalidRequest, NotFound
from brim.server.wire.responses import ErrorBody, ErrorDetail

log = logging.getLogger("brim.server")

_CODES: dict[type[BrimError], str] = {ContextOverflow: "context_length_exceeded"}
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
    """`Retry-After` in whole seconds, where waiting helps."""
    if error.retry_after_s is None:
        return {}
    return {"retry-after": str(max(1, math.ceil(error.retry_after_s)))}


def error_response(error: BrimError) -> Response:
    """The response for an error that came before the first byte."""
    return Response(
        error_json(error),
        status_code=error.status,
        headers=error_headers(error),
        media_type="application/json",
    )


def internal(exc: BaseException) -> BrimError:
    """What the client is told of a bug here; the traceback goes to the log."""
    log.error("unexpected %s while answering a request", type(exc).__name__, exc_info=exc)
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


async def on_bug(_: Request, exc: Exception) -> Response:
    """Starlette's handler for everything else; it raises `exc` again for the server's log."""
    return error_response(BrimError(_OUR_FAULT))
