"""`GET /brim/v1/usage`: what the app that asks has used today, and what its budgets leave it."""

from typing import Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from brim.apps.meter import Left
from brim.core.app import App
from brim.errors import Unauthenticated
from brim.server.caller import known_caller
from brim.server.wire.responses import AmountUsed, AppUsage


class UsageSource(Protocol):
    """Where usage is looked up; `apps.meter.Meter` is one."""

    def left(self, app: str) -> Left:
        """Where the app stands today."""
        ...


class UsageRoute:
    """Tells an app about itself, and nobody about another.

    Args:
        usage: Where it is looked up; None where no app is known.
    """

    def __init__(self, usage: UsageSource | None) -> None:
        self._usage = usage

    async def get(self, request: Request) -> Response:
        """The figures of today.

        Raises:
            Unauthenticated: No app asks.
        """
        app = known_caller(request.scope).app
        if app is None or self._usage is None:
            raise Unauthenticated(
                "usage is told to the app whose it is; send its key, or ask on the machine itself "
                "with: brim apps usage"
            )
        body = _usage_of(app, self._usage.left(app.name))
        return Response(msgspec.json.encode(body), media_type="application/json")


def _usage_of(app: App, left: Left) -> AppUsage:
    budgets, limits = app.budgets, app.limits
    return AppUsage(
        app=app.name,
        day=left.day,
        renews_in_s=round(left.renews_in_s, 1),
        tokens=AmountUsed(
            used=left.used_tokens,
            reserved=left.reserved_tokens,
            budget=budgets.tokens,
            left=left.left_tokens,
        ),
        energy_j=AmountUsed(
            used=round(left.used_energy_j, 3), budget=budgets.energy_j, left=left.left_energy_j
        ),
        ssd_write_bytes=AmountUsed(
            used=left.ssd_written_bytes,
            budget=budgets.ssd_write_bytes,
            left=left.left_ssd_write_bytes,
        ),
        num_in_flight=left.num_in_flight,
        max_concurrent=limits.max_concurrent,
        requests_per_minute=limits.requests_per_minute,
    )
