"""What the governor lets happen at the moment, and what of it workers are told."""

from enum import StrEnum

import msgspec

from brim.core.machine import Pressure


class PowerMode(StrEnum):
    """How much power and heat work may cost."""

    FULL = "full"
    BATTERY = "battery"
    """Nothing is plugged in: what nobody waits for can wait."""
    SAVING = "saving"
    """Low power mode, a low battery, or a machine that slows down because it is hot."""
    HOT = "hot"
    """Close to where the system stops programs."""


class WorkLimits(msgspec.Struct, frozen=True, kw_only=True):
    """How hard one worker may work; sent to it whenever it changes."""

    stall_fraction: float = 1.0
    """Of the stall target: smaller prefill chunks take less scratch memory and heat."""
    max_running: int | None = None
    """Most sequences that requests hold at once; None leaves it to the plan.  Those that run go
    on."""
    pace_fraction: float = 1.0
    """Share of the time in which steps run; the rest is slept between them."""
    runs_background: bool = True
    """False: background requests that have not begun wait."""
    is_urgent: bool = True
    """False where nobody waits or power is short: the system may take slower cores."""


class Stance(msgspec.Struct, frozen=True, kw_only=True):
    """What holds until the governor says otherwise; everything is allowed by default."""

    memory: Pressure = Pressure.NORMAL
    power: PowerMode = PowerMode.FULL
    reason: str = ""
    """Half a sentence for clients: 'memory is short: the system reports critical pressure'."""
    admits: bool = True
    """False: no new request, and no load."""
    loads: bool = True
    """False: models that are out of memory stay there; whoever asks for one waits."""
    max_answer_tokens: int | None = None
    """Bound of new interactive answers that give no `max_tokens`, beside the settings'."""
    max_background_answer_tokens: int | None = None
    """Bound of new background answers, whatever they ask for."""
    context_fraction: float = 1.0
    """Of the window, for new work."""
    prefers_draft: bool = False
    """Whether apps that allow it are served by the smaller model of a pair."""
    retry_after_s: float = 15.0
    """When to ask again, where something is refused."""
    work: WorkLimits = WorkLimits()
