"""Sums the account by term: what `brim ps` and monitoring show."""

from collections.abc import Mapping, Sequence

from brim.core.machine import MachineSpec
from brim.ledger.budget import Budget
from brim.ledger.entry import Entry, EntryLine, Statement, Transient, TransientKind
from brim.ledger.kv import KvAccount


def statement_of(
    entries: Sequence[Entry],
    pools: Mapping[str, KvAccount],
    transients: Sequence[Transient],
    machine: MachineSpec,
    budget: Budget,
    charged_bytes: int,
) -> Statement:
    """The account by one reading of the machine.

    Args:
        entries: Grants in force.
        pools: KV pools of those models that have one, by name.
        transients: Reservations for a moment.
        machine: The reading.
        budget: What it allows.
        charged_bytes: What all of it costs.
    """
    terms = [entry.terms for entry in entries]
    mapped = sum(each.mapped_bytes for each in terms)
    lines = tuple(_line(entry, pools.get(entry.name)) for entry in entries)
    return Statement(
        ram_bytes=machine.ram_bytes,
        others_bytes=machine.others_bytes,
        reserve_bytes=budget.reserve_bytes,
        comfortable_bytes=budget.comfortable.num_bytes,
        comfortable_binding=budget.comfortable.binding,
        tight_bytes=budget.tight.num_bytes,
        tight_binding=budget.tight.binding,
        charged_bytes=charged_bytes,
        weights_mapped_bytes=mapped,
        weights_dirty_bytes=sum(t.weights_bytes + t.repacked_bytes for t in terms) - mapped,
        kv_committed_bytes=sum(each.kv_bytes for each in terms),
        kv_reserved_bytes=sum(line.kv_reserved_bytes for line in lines),
        compute_reserved_bytes=sum(each.compute_bytes for each in terms),
        compute_touched_bytes=sum(each.compute_touched_bytes for each in terms),
        overhead_bytes=sum(each.overhead_bytes for each in terms),
        prefix_cache_bytes=_sum(transients, TransientKind.PREFIX_CACHE_WRITE),
        transient_bytes=_sum(transients, TransientKind.KV_GROWTH),
        is_simulated=machine.is_simulated,
        entries=lines,
    )


def _sum(transients: Sequence[Transient], kind: TransientKind) -> int:
    return sum(each.num_bytes for each in transients if each.kind is kind)


def _line(entry: Entry, pool: KvAccount | None) -> EntryLine:
    reserved, size = (0, 0) if pool is None else (pool.reserved_tokens, pool.kv_tokens)
    return EntryLine(
        name=entry.name,
        verdict=entry.verdict,
        phase=entry.phase,
        is_forced=entry.is_forced,
        planned_bytes=entry.planned.total_bytes,
        charged_bytes=entry.charged_bytes,
        measured_bytes=entry.measured_bytes,
        kv_pool_tokens=size,
        kv_reserved_tokens=reserved,
        kv_reserved_bytes=entry.terms.kv_bytes * reserved // size if size else 0,
    )
