"""Grants memory to loaded models: the sum of all entries stays within the budget.

Pure: a reading of the machine comes in with each question.  `MachineSpec.others_bytes` must leave
out the processes of the entries themselves, as `machine.read_machine` does.
"""

from collections.abc import Callable, Collection, Mapping, Sequence

import msgspec

from brim.core.machine import MachineSpec
from brim.core.memory import MemoryTerms
from brim.core.plan import Grant, Plan, Verdict
from brim.core.units import gib
from brim.errors import DoesNotFit
from brim.ledger.budget import Budget, Limit, budget_of
from brim.ledger.correction import NO_ERRORS, PastErrors, corrected
from brim.ledger.entry import (
    Entry,
    Phase,
    Statement,
    Transient,
    TransientKind,
)
from brim.ledger.kv import KvAccount
from brim.ledger.statement import statement_of
from brim.ledger.ways import ways_to_fit
from brim.planner.fit import Room

Wish = Plan | MemoryTerms
"""A plan, or its bytes alone: then the ways to fit say nothing of load options."""


class Account:
    """All grants of one machine.

    Args:
        budget: What a machine allows; another one for tests or a machine not at hand.
    """

    def __init__(self, budget: Callable[[MachineSpec], Budget] = budget_of) -> None:
        self._budget = budget
        self._entries: dict[str, Entry] = {}
        self._pools: dict[str, KvAccount] = {}
        self._transients: dict[tuple[str, TransientKind], Transient] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def entries(self) -> list[Entry]:
        """Grants in force, oldest first."""
        return list(self._entries.values())

    def entry(self, name: str) -> Entry:
        """One grant in force.

        Raises:
            KeyError: No such entry.
        """
        return self._entries[name]

    @property
    def charged_bytes(self) -> int:
        """What all entries and transients cost together.

        Models that are granted and not loaded yet hold nothing, so a load peak of another may use
        their bytes for a moment: loads follow each other.
        """
        entries = self._entries.values()
        settled = sum(entry.charged_bytes for entry in entries)
        now = sum(entry.peak_bytes for entry in entries)
        return max(settled, now) + sum(each.num_bytes for each in self._transients.values())

    def promises(self) -> list[tuple[str, int]]:
        """(name, bytes) of everything that is charged, for other processes to count."""
        entries = [(entry.name, entry.charged_bytes) for entry in self._entries.values()]
        return entries + [(each.kind, each.num_bytes) for each in self._transients.values()]

    def room(self, machine: MachineSpec, *, without: Collection[str] = ()) -> Room:
        """What is left to be granted, for a plan that is to suit it.

        Args:
            machine: A fresh reading.
            without: Entries to leave out, as if they had been released.
        """
        if without:
            return self._copy(without).room(machine)
        budget, charged = self._budget(machine), self.charged_bytes
        return Room(
            max(0, budget.comfortable.num_bytes - charged), max(0, budget.tight.num_bytes - charged)
        )

    def ask(
        self,
        wanted: Wish,
        machine: MachineSpec,
        *,
        past: PastErrors = NO_ERRORS,
        without: Collection[str] = (),
    ) -> Grant:
        """What `grant` would answer; changes nothing.

        Args:
            wanted: What is to be loaded.
            machine: A fresh reading.
            past: What earlier forecasts of this model got wrong.
            without: Entries to leave out, as if they had been released.
        """
        if without:
            return self._copy(without).ask(wanted, machine, past=past)
        planned = wanted.memory if isinstance(wanted, Plan) else wanted
        terms, charged, budget = corrected(planned, past), self.charged_bytes, self._budget(machine)
        asked, peak = terms.total_bytes, max(terms.total_bytes, terms.load_peak_bytes)
        if asked + charged <= budget.comfortable.num_bytes and (
            peak + charged <= budget.tight.num_bytes
        ):
            return _grant(Verdict.COMFORTABLE, asked, planned, charged, budget.comfortable)
        verdict, limit = Verdict.TIGHT, budget.comfortable
        if asked + charged > budget.tight.num_bytes:
            verdict, limit = Verdict.NO, budget.tight
        elif peak + charged > budget.tight.num_bytes:
            verdict, asked = Verdict.NO, peak
            limit = Limit(budget.tight.num_bytes, f"{budget.tight.binding}, while it loads")
        charges = {name: entry.charged_bytes for name, entry in self._entries.items()}
        ways = ways_to_fit(wanted, limit, charges, machine, asked_bytes=asked)
        return _grant(verdict, asked, planned, charged, limit, ways)

    def ask_all(
        self, wishes: Sequence[tuple[str, Wish]], machine: MachineSpec
    ) -> list[tuple[str, Grant]]:
        """What several wishes would be answered, each beside the entries and the wishes before it.

        A wish that does not fit is left out of what the next ones stand beside.  One that names an
        entry stands in its place: "what if this model, loaded already, had 64 K of context?"
        """
        trial, answers = self._copy({name for name, _ in wishes}), []
        for name, wanted in wishes:
            answer = trial.ask(wanted, machine, without=[name])
            answers.append((name, answer))
            if answer.verdict is not Verdict.NO:
                trial.release(name)
                trial.grant(name, wanted, machine)
        return answers

    def grant(
        self,
        name: str,
        wanted: Wish,
        machine: MachineSpec,
        *,
        past: PastErrors = NO_ERRORS,
        pool: KvAccount | None = None,
        force: bool = False,
    ) -> Grant:
        """Enter a model into the account.

        Args:
            name: The model's name; each stands once.
            wanted: As in `ask`.
            machine: A fresh reading.
            past: As in `ask`.
            pool: The model's KV pool, so that its reservations show in the account.
            force: Enter it even where it does not fit; the grant says NO all the same.

        Raises:
            DoesNotFit: It is over the tight budget; the message says by how much and what helps.
        """
        assert name not in self._entries, f"{name} is granted twice"
        answer = self.ask(wanted, machine, past=past)
        if answer.verdict is Verdict.NO and not force:
            raise DoesNotFit(refusal(name, answer))
        planned = wanted.memory if isinstance(wanted, Plan) else wanted
        terms = corrected(planned, past)
        self._entries[name] = Entry(
            name=name,
            planned=planned,
            terms=terms,
            full_kv_bytes=terms.kv_bytes,
            verdict=answer.verdict,
            is_forced=answer.verdict is Verdict.NO,
        )
        if pool is not None:
            self._pools[name] = pool
        return answer

    def begin_load(self, name: str) -> None:
        """The model is about to be loaded: until `end_load` it may take its load peak.

        Raises:
            KeyError: No such entry.
        """
        self._replace(name, phase=Phase.LOADING)

    def end_load(self, name: str) -> None:
        """The model is loaded: what only loading needed is free again.

        Raises:
            KeyError: No such entry.
        """
        self._replace(name, phase=Phase.LOADED)

    def release(self, name: str) -> None:
        """Take a model and its transients out of the account; nothing where it is not in it."""
        self._entries.pop(name, None)
        self._pools.pop(name, None)
        for key in [key for key in self._transients if key[0] == name]:
            del self._transients[key]

    def reconcile(self, name: str, measured_bytes: int) -> None:
        """Note what a model's process was seen to hold, so that an overrun is charged.

        Raises:
            KeyError: No such entry.
        """
        self._replace(name, measured_bytes=measured_bytes)

    def resize_pool(self, name: str, kv_tokens: int, plan_tokens: int) -> None:
        """Charge a model for the pool that it has now, in place of the one of its plan.

        What was measured before says nothing of it any more.

        Args:
            name: The model.
            kv_tokens: Cells of its pool.
            plan_tokens: Cells that it was granted.

        Raises:
            KeyError: No such entry.
        """
        entry = self._entries[name]
        kv_bytes = pool_bytes(entry.full_kv_bytes, kv_tokens, plan_tokens)
        terms = msgspec.structs.replace(entry.terms, kv_bytes=kv_bytes)
        self._replace(name, terms=terms, measured_bytes=None)

    def trial_copy(
        self, *, without: Collection[str] = (), kv_bytes: Mapping[str, int] | None = None
    ) -> "Account":
        """The account as it would be without some entries and with smaller pools of others.

        Args:
            without: Entries to leave out, as if they had been released.
            kv_bytes: Entry -> what its pool would take.
        """
        copy = self._copy(without)
        for name, num_bytes in (kv_bytes or {}).items():
            if name in copy:
                entry = copy.entry(name)
                freed, measured = entry.terms.kv_bytes - num_bytes, entry.measured_bytes
                copy._replace(
                    name,
                    terms=msgspec.structs.replace(entry.terms, kv_bytes=num_bytes),
                    measured_bytes=None if measured is None else max(0, measured - freed),
                )
        return copy

    def reserve(
        self, owner: str, kind: TransientKind, num_bytes: int, machine: MachineSpec
    ) -> bool:
        """Set bytes aside for a moment; False where they are not free under the tight budget.

        Args:
            owner: The entry that needs them; releasing it gives them back as well.
            kind: What for; one reservation of a kind for each owner.
            num_bytes: How many.
            machine: A fresh reading.
        """
        assert (owner, kind) not in self._transients, f"{owner} reserves {kind} twice"
        if num_bytes + self.charged_bytes > self._budget(machine).tight.num_bytes:
            return False
        self._transients[owner, kind] = Transient(owner, kind, num_bytes)
        return True

    def release_transient(self, owner: str, kind: TransientKind) -> None:
        """Give back what was set aside for a moment; nothing where nothing was."""
        self._transients.pop((owner, kind), None)

    def short_of_growth(self, name: str, num_kv_tokens: int, machine: MachineSpec) -> int:
        """Bytes that a request could still make its model take and that are not free any more.

        A pool is granted as a whole, so a request is only short where other programs have taken
        what the model was granted and does not hold yet.  What requests that were admitted before
        it can still take, of any model, is not free to it.  0 for a model that was forced in:
        whoever loaded it has accepted that.

        Args:
            name: The model.
            num_kv_tokens: The request's bound; 0 where the pool has reserved it already.
            machine: A fresh reading.

        Raises:
            KeyError: No such entry.
        """
        entry = self._entries[name]
        growth = self._growth_bytes(entry, num_kv_tokens)
        if entry.is_forced or not growth:
            return 0
        for other in self._entries.values():
            growth += 0 if other is entry else self._growth_bytes(other)
        held = sum(each.held_bytes for each in self._entries.values())
        free = self._budget(machine).tight.num_bytes - held
        return max(0, growth - max(0, free))

    def statement(self, machine: MachineSpec) -> Statement:
        """All terms of the account, for people and for monitoring."""
        return statement_of(
            self.entries(),
            self._pools,
            list(self._transients.values()),
            machine,
            self._budget(machine),
            self.charged_bytes,
        )

    def _growth_bytes(self, entry: Entry, num_kv_tokens: int = 0) -> int:
        """Most that a model may still take for what it has admitted and for a request more.

        What was admitted counts in full: nobody knows how much of it is in `held_bytes` already.
        """
        pool, num_bytes = self._pools.get(entry.name), entry.terms.kv_bytes
        if pool is not None:
            num_tokens = min(pool.kv_tokens, pool.reserved_tokens + num_kv_tokens)
            num_bytes = -(-num_bytes * num_tokens // max(1, pool.kv_tokens))
        return min(num_bytes, entry.charged_bytes - entry.held_bytes)

    def _replace(self, name: str, **changes: object) -> None:
        self._entries[name] = msgspec.structs.replace(self._entries[name], **changes)

    def _copy(self, without: Collection[str]) -> "Account":
        """The account as it would be without some entries; pools are left behind."""
        copy = Account(self._budget)
        copy._entries = {n: each for n, each in self._entries.items() if n not in without}
        copy._transients = {k: each for k, each in self._transients.items() if k[0] not in without}
        return copy


def pool_bytes(full_bytes: int, kv_tokens: int, plan_tokens: int) -> int:
    """What a pool takes, rounded up, where the planned one takes `full_bytes`.

    Example:
        >>> pool_bytes(1000, 256, 1024)
        250
    """
    return -(-full_bytes * kv_tokens // max(1, plan_tokens))


def _grant(
    verdict: Verdict,
    asked: int,
    planned: MemoryTerms,
    charged: int,
    limit: Limit,
    ways: tuple[str, ...] = (),
) -> Grant:
    free = limit.num_bytes - charged
    return Grant(
        verdict=verdict,
        asked_bytes=asked,
        planned_bytes=planned.total_bytes,
        budget_bytes=max(0, free),
        short_bytes=max(0, asked - max(0, free)),
        binding=limit.binding,
        ways_to_fit=ways,
    )


def refusal(name: str, grant: Grant) -> str:
    """One sentence for a grant of NO: the bytes short, the binding term, and what would help."""
    ways = "; or ".join([*grant.ways_to_fit, "load it anyway with --force"])
    asked, planned = gib(grant.asked_bytes), gib(grant.planned_bytes)
    beside = f" ({planned} planned)" if grant.planned_bytes and planned != asked else ""
    return (
        f"{name} needs {asked}{beside}, {gib(grant.short_bytes)} more than is free "
        f"({gib(grant.budget_bytes)} by {grant.binding}): {ways}"
    )
