"""What a check says, and what a check is."""

from collections.abc import Callable
from enum import StrEnum

import msgspec

from brim.doctor.facts import Facts


class Verdict(StrEnum):
    """How much a finding asks for; from best to worst."""

    OK = "ok"
    NOTE = "note"
    """Worth knowing; nothing need be done."""
    WARNING = "warning"
    """Costs speed or memory, or will."""
    PROBLEM = "problem"
    """Models are refused, slow or at risk until it is mended."""


class Result(msgspec.Struct, frozen=True):
    """What one check found."""

    verdict: Verdict
    found: str
    """In words, with the figures."""
    mend: str = ""
    """The command, or what to do where no command does it; empty where nothing need be done."""


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One question about this machine."""

    name: str
    group: str
    why: str
    """Why it matters, in a sentence or two."""
    needs: tuple[str, ...]
    """Fields of `Facts` without which it cannot be answered."""
    judge: Callable[[Facts], Result]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """The answer, as it is shown."""

    check: str
    group: str
    verdict: Verdict
    found: str
    why: str
    mend: str = ""


def finding_of(check: Check, facts: Facts) -> Finding:
    """The finding of one check; a note where what it needs could not be read."""
    unread = [facts.unread[name] for name in check.needs if getattr(facts, name) is None]
    if unread:
        result = Result(Verdict.NOTE, f"could not be checked: {'; '.join(unread)}")
    else:
        result = check.judge(facts)
    return Finding(
        check=check.name,
        group=check.group,
        verdict=result.verdict,
        found=result.found,
        why=check.why,
        mend=result.mend,
    )


def ok(found: str) -> Result:
    """Nothing to do."""
    return Result(Verdict.OK, found)


def note(found: str, mend: str = "") -> Result:
    """Worth knowing."""
    return Result(Verdict.NOTE, found, mend)


def warning(found: str, mend: str) -> Result:
    """Costs something."""
    return Result(Verdict.WARNING, found, mend)


def problem(found: str, mend: str) -> Result:
    """Must be mended."""
    return Result(Verdict.PROBLEM, found, mend)
