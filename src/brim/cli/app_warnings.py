"""What this machine, as it is now, lacks for an app: told when the app is added, never refused."""

import contextlib
from typing import TYPE_CHECKING

from brim.core.app import App
from brim.errors import BrimError

if TYPE_CHECKING:
    from brim.runtime.api import ModelStatus

ANSWER_LIMIT_S = 2.0
"""For a running server to name its models; without them only a warning is less precise."""


def warnings_for(app: App) -> list[str]:
    """A sentence for each thing that the app asks for and will not get as things stand."""
    return [
        *_about_memory(app),
        *_about_energy(app),
        *_about_models(app),
        *_about_pairs(app),
    ]


def _about_memory(app: App) -> list[str]:
    if app.required_bytes is None:
        return []
    from brim.ledger.budget import budget_of
    from brim.machine.reading import read_machine

    budget = budget_of(read_machine())
    limit = budget.tight
    # What our servers hold is given to models already, perhaps to these.
    given_bytes = max(0, limit.num_bytes) + _held_bytes()
    if app.required_bytes <= given_bytes:
        return []
    return [
        f"'{app.name}' requires {app.required_bytes / 1e9:.1f} GB for its models, and this machine "
        f"has {given_bytes / 1e9:.1f} GB to give now ({limit.binding}): close other programs, "
        "or give it smaller models"
    ]


def _about_energy(app: App) -> list[str]:
    if app.budgets.energy_j is None:
        return []
    from brim.machine.energy import counters_at_hand

    counters = counters_at_hand()
    if counters.read_uj():
        return []
    return [
        f"the energy budget of '{app.name}' will not be kept: this machine does not say what "
        f"energy is used ({counters.source})"
    ]


def _about_models(app: App) -> list[str]:
    if not app.models:
        return []
    served = _served()
    if served is not None:
        return [
            f"'{app.name}' may use '{model}', which the running server does not serve; it serves: "
            f"{', '.join(sorted(served))}"
            for model in app.models
            if model not in served
        ]
    known = _at_hand()
    return [
        f"'{app.name}' may use '{model}', and no model of this machine has that name; the name is "
        f"what clients see: brim serve -m {model}=REFERENCE"
        for model in app.models
        if model not in known
    ]


def _about_pairs(app: App) -> list[str]:
    if not app.pairs:
        return []
    from brim.config.load import load_settings

    loaded_as_one = load_settings().settings.models.pairs
    return [
        f"'{pair.target}' and '{pair.draft}' are a pair to '{app.name}', and the settings do not "
        f'load them as one: set models.pairs = ["{pair.target}+{pair.draft}"]'
        for pair in app.pairs
        if f"{pair.target}+{pair.draft}" not in loaded_as_one
    ]


def _served() -> set[str] | None:
    """Names that running servers give their models; None where none runs, or none says."""
    return {status.name for status in _statuses()} or None


def _held_bytes() -> int:
    """Bytes that models of running servers hold."""
    return sum(status.resident_bytes or 0 for status in _statuses())


def _statuses() -> "list[ModelStatus]":
    """The models of all running servers that say."""
    from brim.cli.neighbours import statuses_of
    from brim.cli.state import running_servers

    found: list[ModelStatus] = []
    for server in running_servers():
        with contextlib.suppress(BrimError):
            found += statuses_of(server, within_s=ANSWER_LIMIT_S)
    return found


def _at_hand() -> set[str]:
    """Names that the models on this machine have where `serve` is not told another."""
    from brim.registry.sources import list_local

    return {model.spec.name for model in list_local() if model.spec is not None}
