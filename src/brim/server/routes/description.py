"""`GET /openapi.json`."""

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from brim.runtime.api import Runtime
from brim.server.caller import known_caller
from brim.server.openapi import describe


class DescriptionRoute:
    """Describes the interface, with the names of the models that the caller may use."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    async def get(self, request: Request) -> Response:
        """The OpenAPI document."""
        document = describe(known_caller(request.scope).visible(self._runtime.models()))
        return Response(msgspec.json.encode(document), media_type="application/json")
