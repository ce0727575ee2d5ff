"""What each level of memory and each power mode allows; the two together allow the less.  Pure."""

import msgspec

from brim.core.machine import Pressure
from brim.core.stance import PowerMode, Stance, WorkLimits

RETRY_AFTER_S = 15.0
"""A level holds 10 s after its last reading, and a client that asks 5 s later finds it gone."""

MEMORY = {
    Pressure.NORMAL: Stance(),
    # Half of a chunk's rows is half of the scratch memory that it touches (measured: 100 MB at 512
    # rows), and answers that nobody waits for get less of the KV that was just given back.
    Pressure.WARNING: Stance(
        loads=False,
        max_background_answer_tokens=512,
        work=WorkLimits(stall_fraction=0.5),
    ),
    # What runs is finished; everything else would take what the system has not got.
    Pressure.CRITICAL: Stance(
        admits=False,
        loads=False,
        max_background_answer_tokens=256,
        work=WorkLimits(stall_fraction=0.25, runs_background=False),
    ),
}

POWER = {
    PowerMode.FULL: Stance(),
    # Somebody who works on battery wants answers as fast as ever, and long ones can wait.
    PowerMode.BATTERY: Stance(max_background_answer_tokens=512),
    # A fanless machine loses 20 to 40 % of its speed after 30 to 90 s of load: at three quarters of
    # the time it hardly gets slower than it would have been, and stays there.  Four sequences still
    # share each reading of the weights.  Prompts are what heats most, hence half the window.
    PowerMode.SAVING: Stance(
        max_answer_tokens=1024,
        max_background_answer_tokens=256,
        context_fraction=0.5,
        prefers_draft=True,
        work=WorkLimits(
            stall_fraction=0.5,
            max_running=4,
            pace_fraction=0.75,
            runs_background=False,
            is_urgent=False,
        ),
    ),
    # One answer at a time, mostly resting: the next state ends programs or puts the machine to
    # sleep.
    PowerMode.HOT: Stance(
        max_answer_tokens=512,
        max_background_answer_tokens=128,
        context_fraction=0.25,
        prefers_draft=True,
        work=WorkLimits(
            stall_fraction=0.25,
            max_running=1,
            pace_fraction=0.35,
            runs_background=False,
            is_urgent=False,
        ),
    ),
}

_REASONS = {
    Pressure.WARNING: "memory is getting short",
    Pressure.CRITICAL: "memory is short",
    PowerMode.BATTERY: "power is from the battery",
    PowerMode.SAVING: "power is being saved",
    PowerMode.HOT: "the machine is hot",
}


def stance_for(
    memory: Pressure,
    power: PowerMode,
    *,
    memory_cause: str = "",
    power_cause: str = "",
    may_load: bool = False,
) -> Stance:
    """What holds at a level of memory and a power mode.

    Args:
        memory: The level.
        power: The mode.
        memory_cause: The reading behind the level.
        power_cause: The reading behind the mode.
        may_load: Allow loads in spite of a warning.

    Example:
        >>> stance_for(Pressure.CRITICAL, PowerMode.FULL, memory_cause="the system swaps").reason
        'memory is short: the system swaps'
    """
    short, slow = MEMORY[memory], POWER[power]
    reasons = (_reason(memory, memory_cause), _reason(power, power_cause))
    return Stance(
        memory=memory,
        power=power,
        reason="; ".join(reason for reason in reasons if reason),
        admits=short.admits and slow.admits,
        loads=short.loads or (memory is Pressure.WARNING and may_load),
        max_answer_tokens=_least(short.max_answer_tokens, slow.max_answer_tokens),
        max_background_answer_tokens=_least(
            short.max_background_answer_tokens, slow.max_background_answer_tokens
        ),
        context_fraction=min(short.context_fraction, slow.context_fraction),
        prefers_draft=short.prefers_draft or slow.prefers_draft,
        retry_after_s=RETRY_AFTER_S,
        work=_both(short.work, slow.work),
    )


def same_rules(one: Stance, other: Stance) -> bool:
    """Whether two stances differ at most in their reasons."""
    return msgspec.structs.replace(one, reason="") == msgspec.structs.replace(other, reason="")


def _both(one: WorkLimits, other: WorkLimits) -> WorkLimits:
    return WorkLimits(
        stall_fraction=min(one.stall_fraction, other.stall_fraction),
        max_running=_least(one.max_running, other.max_running),
        pace_fraction=min(one.pace_fraction, other.pace_fraction),
        runs_background=one.runs_background and other.runs_background,
        is_urgent=one.is_urgent and other.is_urgent,
    )


def _least(one: int | None, other: int | None) -> int | None:
    given = [bound for bound in (one, other) if bound is not None]
    return min(given, default=None)


def _reason(level: Pressure | PowerMode, cause: str) -> str:
    words = _REASONS.get(level, "")
    return f"{words}: {cause}" if words and cause else words
