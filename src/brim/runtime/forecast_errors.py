"""Keeps what each load was forecast to take beside what it took."""

import asyncio
import uuid

from brim.core.machine import MachineSpec
from brim.core.memory import Footprint, MemoryTerms
from brim.core.plan import Plan
from brim.ledger.correction import TOTAL
from brim.ledger.history import ForecastError, ForecastHistory, Subject

WORTH_WRITING = 1.01
"""A peak is written again when it has grown by this: a write for each page would wear disks."""


def subject_of(plan: Plan, machine: MachineSpec) -> Subject:
    """What the errors of a plan's forecast are kept under."""
    name = f"{machine.name}, {machine.ram_bytes} bytes"
    if machine.is_simulated:
        name = f"{name}, simulated"
    return Subject(plan.model.fingerprint, plan.engine, name)


def new_load_id() -> str:
    """A name for one load that no other process gives."""
    return uuid.uuid4().hex


def measured_terms(planned: MemoryTerms, footprint: Footprint) -> dict[str, tuple[int, int]]:
    """Term -> (planned, measured) of what a backend reports by itself.

    A backend that rearranges weights reports the copy among them.  One that takes KV and scratch
    when they are used has no KV yet after loading, and crumbs of scratch at most, which say nothing
    of what it will take.
    """
    weights = (planned.weights_bytes + planned.repacked_bytes, footprint.weights_bytes)
    terms = {"weights_bytes": weights}
    if footprint.kv_bytes or not planned.kv_bytes:
        compute_bytes = footprint.compute_bytes + footprint.output_bytes
        terms["kv_bytes"] = (planned.kv_bytes, footprint.kv_bytes)
        terms["compute_bytes"] = (planned.compute_bytes, compute_bytes)
    return terms


class LoadRecord:
    """One load of one model, from its first measurement to its last.

    Args:
        plan: How it was loaded.
        machine: The reading that it was granted by.
        history: Where the figures are kept.
    """

    def __init__(self, plan: Plan, machine: MachineSpec, history: ForecastHistory) -> None:
        self._planned = plan.memory
        self._subject = subject_of(plan, machine)
        self._history = history
        self._load_id = new_load_id()
        self._written_bytes = 0
        self._errors: dict[str, ForecastError] = {}

    def errors(self) -> tuple[ForecastError, ...]:
        """What is known so far, one for each term."""
        return tuple(self._errors.values())

    async def loaded(self, footprint: Footprint) -> None:
        """The backend has said what it took."""
        await self._record(measured_terms(self._planned, footprint))

    async def measured(self, resident_bytes: int, *, has_filled: bool) -> None:
        """The system was asked what the process holds.

        The forecast is of a process whose context was filled: before, pages were not touched yet,
        and only more than it says something.

        Args:
            resident_bytes: What it holds now; the most that it ever held counts.
            has_filled: Whether a request has filled the context.
        """
        expected = self._planned.resident_bytes
        is_news = resident_bytes > self._written_bytes * WORTH_WRITING
        if is_news and (has_filled or resident_bytes > expected):
            self._written_bytes = resident_bytes
            await self._record({TOTAL: (expected, resident_bytes)})

    async def _record(self, terms: dict[str, tuple[int, int]]) -> None:
        for term, (planned, measured) in terms.items():
            self._errors[term] = ForecastError.of(term, planned, measured)
        await asyncio.to_thread(self._history.record, self._subject, self._load_id, terms)
