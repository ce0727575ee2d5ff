"""`GET /openapi.json`."""

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from brim.runtime.api import Runtime
from brim.server.openapi import describe


class DescriptionRoute:
    """Describes the interface, with the served models' names."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    async def get(self, _: Request) -> Response:
        """The OpenAPI document."""
        document = describe(self._runtime.models())
        return Response(msgspec.json.encode(document), media_type="application/json")
