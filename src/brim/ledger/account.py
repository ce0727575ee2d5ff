"""Grants memory to loaded models: the sum of all entries stays within the budget.

Pure: a reading of the machine comes in with each question.  `MachineSpec.others_bytes` must leave
out the processes of the entries themselves, as `machine.read_machine` does.
"""

from collections.abc import Callable

import msgspec

from brim.core.machine import MachineSpec
from brim.core.memory import MemoryTerms
from brim.core.plan import Grant, Plan, Verdict
from brim.errors import DoesNotFit
from brim.ledger.budget import Budget, Limit, budget_of
from brim.ledger.ways import gib, ways_to_fit


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One grant in force."""

    name: str
    terms: MemoryTerms
    verdict: Verdict
    measured_bytes: int | None = None
    """What the process was last seen to hold; None before the first reading."""

    @property
    def charged_bytes(self) -> int:
        """What the entry costs the account: its grant, or what it was seen to hold if more."""
        return max(self.terms.total_bytes, self.measured_bytes or 0)


class Account:
    """All grants of one machine.

    Args:
        budget: What a machine allows; another one for tests or a machine not at hand.
    """

    def __init__(self, budget: Callable[[MachineSpec], Budget] = budget_of) -> None:
        self._budget = budget
        self._entries: dict[str, Entry] = {}

    def entries(self) -> list[Entry]:
        """Grants in force, oldest first."""
        return list(self._entries.values())

    @property
    def charged_bytes(self) -> int:
        """What all entries cost together."""
        return sum(entry.charged_bytes for entry in self._entries.values())

    def ask(self, wanted: Plan | MemoryTerms, machine: MachineSpec) -> Grant:
        """What `grant` would answer; changes nothing.

        Args:
            wanted: A plan, or its bytes alone: then the ways to fit say nothing of load options.
            machine: A fresh reading.
        """
        terms = wanted.memory if isinstance(wanted, Plan) else wanted
        asked, charged, budget = terms.total_bytes, self.charged_bytes, self._budget(machine)
        if asked + charged <= budget.comfortable.num_bytes:
            return _grant(Verdict.COMFORTABLE, asked, charged, budget.comfortable)
        verdict, limit = Verdict.TIGHT, budget.comfortable
        if asked + charged > budget.tight.num_bytes:
            verdict, limit = Verdict.NO, budget.tight
        charges = {name: entry.charged_bytes for name, entry in self._entries.items()}
        ways = ways_to_fit(wanted, limit, charges, machine)
        return _grant(verdict, asked, charged, limit, ways)

    def grant(
        self, name: str, wanted: Plan | MemoryTerms, machine: MachineSpec, *, force: bool = False
    ) -> Grant:
        """Enter a model into the account.

        Args:
            name: The model's name; each stands once.
            wanted: As in `ask`.
            machine: A fresh reading.
            force: Enter it even where it does not fit; the grant says NO all the same.

        Raises:
            DoesNotFit: It is over the tight budget; the message says by how much and what helps.
        """
        assert name not in self._entries, f"{name} is granted twice"
        answer = self.ask(wanted, machine)
        if answer.verdict is Verdict.NO and not force:
            raise DoesNotFit(refusal(name, answer))
        terms = wanted.memory if isinstance(wanted, Plan) else wanted
        self._entries[name] = Entry(name=name, terms=terms, verdict=answer.verdict)
        return answer

    def release(self, name: str) -> None:
        """Take a model out of the account; nothing where it is not in it."""
        self._entries.pop(name, None)

    def reconcile(self, name: str, measured_bytes: int) -> None:
        """Note what a model's process was seen to hold, so that an overrun is charged.

        Raises:
            KeyError: No such entry.
        """
        entry = self._entries[name]
        self._entries[name] = msgspec.structs.replace(entry, measured_bytes=measured_bytes)


def _grant(
    verdict: Verdict, asked: int, charged: int, limit: Limit, ways: tuple[str, ...] = ()
) -> Grant:
    free = limit.num_bytes - charged
    return Grant(
        verdict=verdict,
        asked_bytes=asked,
        budget_bytes=max(0, free),
        short_bytes=max(0, asked - max(0, free)),
        binding=limit.binding,
        ways_to_fit=ways,
    )


def refusal(name: str, grant: Grant) -> str:
    """One sentence for a grant of NO: the bytes short, the binding term, and what would help."""
    ways = "; or ".join([*grant.ways_to_fit, "load it anyway with --force"])
    return (
        f"{name} needs {gib(grant.asked_bytes)}, {gib(grant.short_bytes)} more than is free "
        f"({gib(grant.budget_bytes)} by {grant.binding}): {ways}"
    )
