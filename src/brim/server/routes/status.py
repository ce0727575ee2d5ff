"""`GET /health` for load balancers, `GET /brim/ps` and `GET /brim/ledger` for `brim ps`."""

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from brim.runtime.api import ModelState, ModelStatus, Runtime
from brim.server.wire.responses import Health

_LOADING = frozenset({ModelState.STARTING, ModelState.RESTARTING})
_SERVING = frozenset({ModelState.READY, ModelState.UNLOADED})
"""A model that is out of memory takes requests: the first one loads it."""


class StatusRoutes:
    """Tells how the server and its models stand."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    async def health(self, _: Request) -> Response:
        """200 when every model is ready and requests are taken, 503 with the reason otherwise."""
        health = self._health()
        return Response(
            msgspec.json.encode(health),
            status_code=200 if health.status == "ok" else 503,
            media_type="application/json",
        )

    def _health(self) -> Health:
        statuses = self._runtime.models()
        states = {status.name: status.state.value for status in statuses}
        if self._runtime.is_draining():
            return Health(status="draining", models=states)
        if all(status.state in _SERVING for status in statuses):
            return Health(status="ok")
        is_loading = any(status.state in _LOADING for status in statuses)
        return Health(status="loading" if is_loading else "failed", models=states)

    async def ps(self, _: Request) -> Response:
        """Every model's state, plan and footprint: a list of `runtime.api.ModelStatus`."""
        statuses = [_without_template(status) for status in self._runtime.models()]
        return Response(msgspec.json.encode(statuses), media_type="application/json")

    async def ledger(self, _: Request) -> Response:
        """The account of the machine's memory: `ledger.entry.Statement`, or null before a grant."""
        statement = self._runtime.statement()
        return Response(msgspec.json.encode(statement), media_type="application/json")


def _without_template(status: ModelStatus) -> ModelStatus:
    """Templates are up to 20,000 characters, and nobody reads them in a table of models."""
    model = msgspec.structs.replace(status.plan.model, chat_template=None)
    return msgspec.structs.replace(status, plan=msgspec.structs.replace(status.plan, model=model))
