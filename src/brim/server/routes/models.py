"""`GET /v1/models` and `GET /v1/models/{model}`."""

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from brim.runtime.api import ModelStatus, Runtime
from brim.server.wire.convert import find_model
from brim.server.wire.responses import ModelList, ModelObject


class ModelRoutes:
    """Tells which models are served."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    async def list(self, _: Request) -> Response:
        """All models, in the order in which they were given."""
        return _json(ModelList(data=tuple(_object(status) for status in self._runtime.models())))

    async def get(self, request: Request) -> Response:
        """One model; its name may hold slashes.

        Raises:
            NotFound: It is not served.
        """
        return _json(_object(find_model(request.path_params["model"], self._runtime.models())))


def _object(status: ModelStatus) -> ModelObject:
    return ModelObject(id=status.name, created=status.created_unix_s)


def _json(value: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
