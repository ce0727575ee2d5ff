"""Looks at machines and models, written down, for tests of the governor's policy."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from brim.config.tree import GovernorSettings
from brim.core.machine import Conditions
from brim.governor.actions import Action, ActionKind
from brim.governor.policy import PolicyState, decide
from brim.governor.readings import ModelReading, Readings

GIB = 1024**3


@dataclass
class Looks:
    """Feeds the policy look after look and keeps what it decided."""

    state: PolicyState = field(default_factory=PolicyState)
    settings: GovernorSettings = field(default_factory=GovernorSettings)

    def at(
        self, at_s: float, *models: ModelReading, conditions: Conditions | None = None, **felt: Any
    ) -> tuple[Action, ...]:
        """One look; `felt` are fields of Conditions, or of Readings."""
        own = {name: felt.pop(name) for name in list(felt) if name in Readings.__struct_fields__}
        self.state, actions = decide(
            self.state,
            Readings(
                at_s=at_s,
                conditions=conditions or Conditions(**felt),
                ram_bytes=16 * GIB,
                models=models,
                **own,
            ),
            self.settings,
        )
        return actions


def loaded(name: str = "chat", **fields: Any) -> ModelReading:
    """A loaded model that nobody uses, with a pool as its plan says."""
    given = {"kv_pool_tokens": 4096, "kv_plan_tokens": 4096, "kv_token_bytes": 1024, "idle_s": 5.0}
    return ModelReading(name=name, is_loaded=True, **{**given, **fields})


def kinds(actions: Iterable[Action]) -> list[tuple[ActionKind, str]]:
    """What was decided, and for which model."""
    return [(action.kind, action.model) for action in actions]
