"""`/health` for load balancers, and `/brim/ps`, `/brim/ledger`, `/brim/stance` for `brim ps`."""

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from brim.runtime.api import ModelState, ModelStatus, Runtime
from brim.server.caller import Caller, caller_of
from brim.server.wire.responses import Health

_LOADING = frozenset({ModelState.STARTING, ModelState.RESTARTING})
_SERVING = frozenset({ModelState.READY, ModelState.UNLOADED})
"""A model that is out of memory takes requests: the first one loads it."""


class StatusRoutes:
    """Tells how the server and its models stand."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    async def health(self, request: Request) -> Response:
        """200 when every model is ready and requests are taken, 503 with the reason otherwise.

        Everybody may ask; which models there are is told to those who may use them.
        """
        health = self._health(caller_of(request.scope))
        return Response(
            msgspec.json.encode(health),
            status_code=200 if health.status == "ok" else 503,
            media_type="application/json",
        )

    def _health(self, caller: Caller | None) -> Health:
        statuses = self._runtime.models()
        visible = () if caller is None else caller.visible(statuses)
        states = {status.name: status.state.value for status in visible}
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

    async def stance(self, _: Request) -> Response:
        """What the governor lets happen at the moment: `core.stance.Stance`."""
        return Response(msgspec.json.encode(self._runtime.stance()), media_type="application/json")


def _without_template(status: ModelStatus) -> ModelStatus:
    """Templates are up to 20,000 characters, and nobody reads them in a table of models."""
    model = msgspec.structs.replace(status.plan.model, chat_template=None)
    return msgspec.structs.replace(status, plan=msgspec.structs.replace(status.plan, model=model))
