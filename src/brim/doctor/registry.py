"""Every check, in the order in which groups are shown; docs/doctor.md lists them all."""

from collections.abc import Iterable

from brim.doctor import (
    checks_engines,
    checks_history,
    checks_memory,
    checks_models,
    checks_power,
    checks_storage,
)
from brim.doctor.facts import Facts
from brim.doctor.finding import Finding, Verdict, finding_of

CHECKS = (
    *checks_memory.CHECKS,
    *checks_power.CHECKS,
    *checks_models.CHECKS,
    *checks_engines.CHECKS,
    *checks_storage.CHECKS,
    *checks_history.CHECKS,
)

_ORDER = tuple(Verdict)


def examine(facts: Facts) -> list[Finding]:
    """The findings of all checks, in the registry's order."""
    return [finding_of(check, facts) for check in CHECKS]


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """Problems, then warnings, notes and what is well; in the registry's order among themselves."""
    return sorted(findings, key=lambda finding: -_ORDER.index(finding.verdict))
