"""`GET /v1/models` and `GET /v1/models/{model}`."""

from collections.abc import Sequence

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from brim.runtime.api import ModelStatus, Runtime
from brim.server.caller import known_caller
from brim.server.wire.convert import find_model
from brim.server.wire.responses import ModelList, ModelObject


class ModelRoutes:
    """Tells which models are served."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    async def list(self, request: Request) -> Response:
        """The models that the caller may use, in the order in which they were given."""
        return _json(ModelList(data=tuple(_object(status) for status in self._visible(request))))

    async def get(self, request: Request) -> Response:
        """One model; its name may hold slashes.

        Raises:
            NotFound: It is not served, or not to this caller.
        """
        return _json(_object(find_model(request.path_params["model"], self._visible(request))))

    def _visible(self, request: Request) -> Sequence[ModelStatus]:
        return known_caller(request.scope).visible(self._runtime.models())


def _object(status: ModelStatus) -> ModelObject:
    return ModelObject(id=status.name, created=status.created_unix_s)


def _json(value: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
