"""Is there memory for models, who else has it, and does the system swap for it?"""

from brim.core.machine import Pressure
from brim.core.units import gib
from brim.doctor.facts import Facts
from brim.doctor.finding import Check, Result, note, ok, problem, warning
from brim.doctor.words import some
from brim.governor.levels import AMPLE_FRACTION, REREAD_BYTES_PER_S
from brim.ledger.budget import budget_of

GROUP = "memory"

SMALL_MODEL_BYTES = 3 * 2**30
"""A 3 B model in four bits with a context of 8,192: without room for it, there is none for any that
people use for chat."""

LARGE_PROGRAM_PERCENT = 20
"""Of RAM: one program that holds as much as a model does."""

SWAP_NOTE_BYTES = 256 * 2**20
"""Less is what a system swaps out in weeks without anybody's harm."""

SWAP_PERCENT = 15
"""Of RAM: more than idle pages of sleeping programs."""

RATIO_EARLY = 0.7
"""The kernel warns above 1.0 and is content again below two thirds.
Source: xnu's vm_pageout.c and vm_compressor_xnu.h."""

STALLED_NOTE, STALLED_WARNING = 5.0, 20.0
"""Percent of 10 s in which some task waited for memory; system daemons that act on it do so from
10 to 60 on."""

LOW_AVAILABLE_PERCENT = 5

CLOSE = "close programs that you do not need, or plan for less: brim plan MODEL --ctx 4096"


def _headroom(facts: Facts) -> Result:
    machine = facts.machine
    assert machine is not None
    budget = budget_of(machine)
    free, tight = budget.comfortable, budget.tight.num_bytes
    # What brim's servers hold is spent for what it was meant for.
    held = 0 if facts.processes is None else facts.processes.own_bytes
    found = (
        f"{gib(free.num_bytes)} of {gib(machine.ram_bytes)} fit comfortably ({free.binding}), "
        f"{gib(tight)} at most; others use {gib(machine.others_bytes)}"
    )
    if tight + held < SMALL_MODEL_BYTES // 3:
        return problem(found, CLOSE)
    if free.num_bytes + held < SMALL_MODEL_BYTES:
        return warning(found, CLOSE)
    return ok(found)


def _programs(facts: Facts) -> Result:
    processes, machine = facts.processes, facts.machine
    assert processes is not None
    assert machine is not None
    if not processes.programs:
        return ok("no other program holds more than 50 MB")
    shown = [
        f"{program.name} {gib(program.dirty_bytes)}"
        + (f" in {program.num_processes} processes" if program.num_processes > 1 else "")
        for program in processes.programs
    ]
    found = f"largest: {some(shown, 5)}"
    largest = processes.programs[0]
    if largest.dirty_bytes * 100 > machine.ram_bytes * LARGE_PROGRAM_PERCENT:
        return note(found, f"close {largest.name} before loading a large model")
    return ok(found)


def _swap(facts: Facts) -> Result:
    conditions, machine = facts.conditions, facts.machine
    assert conditions is not None
    assert machine is not None
    used = conditions.swap_used_bytes
    if used is None:
        return note("the system does not say how much is swapped")
    if used < SWAP_NOTE_BYTES:
        return ok(f"{gib(used)} in swap")
    if used * 100 > machine.ram_bytes * SWAP_PERCENT:
        return warning(f"{gib(used)} in swap", CLOSE)
    return note(f"{gib(used)} in swap", CLOSE)


def _pressure(facts: Facts) -> Result:
    conditions, machine = facts.conditions, facts.machine
    assert conditions is not None
    assert machine is not None
    ratio, stalled = conditions.compressor_ratio, conditions.stalled_percent
    available = conditions.available_bytes
    if conditions.pressure is Pressure.CRITICAL:
        return problem("the system reports critical pressure", CLOSE)
    if conditions.pressure is Pressure.WARNING:
        return warning("the system reports warning pressure", CLOSE)
    if stalled is not None and stalled >= STALLED_WARNING:
        waited = f"tasks waited for memory {stalled:g} % of the last 10 s"
        if available is not None and available >= AMPLE_FRACTION * machine.ram_bytes:
            return note(
                f"{waited}, with {gib(available)} free: a limit of their own is full", CLOSE
            )
        return problem(waited, CLOSE)
    # macOS, which reports a level, keeps little available on purpose.
    least = machine.ram_bytes * LOW_AVAILABLE_PERCENT // 100
    if conditions.pressure is None and available is not None and available < least:
        return warning(f"{gib(available)} can be taken before the system reclaims", CLOSE)
    if ratio is not None and ratio >= RATIO_EARLY:
        return warning(f"compressed pages are {ratio:.2f} of the others; at 1.0 it warns", CLOSE)
    if stalled is not None and stalled >= STALLED_NOTE:
        return note(f"tasks waited for memory {stalled:g} % of the last 10 s", CLOSE)
    if conditions.pressure is None and stalled is None:
        rest = "" if available is None else f"; {gib(available)} can be taken without reclaiming"
        return ok(f"the system does not say how it feels{rest}")
    return ok(
        "normal" if stalled is None else f"tasks waited for memory {stalled:g} % of the last 10 s"
    )


def _rereads(facts: Facts) -> Result:
    rereads, conditions, machine = facts.rereads, facts.conditions, facts.machine
    assert rereads is not None
    assert conditions is not None
    assert machine is not None
    rate, available = rereads.bytes_per_s, conditions.available_bytes
    if rate is None:
        return ok("the system does not count what it reads again; see pressure")
    found = f"{rate / 1e6:.0f} MB/s of dropped files are read again"
    if rate < REREAD_BYTES_PER_S[Pressure.WARNING].enter:
        return ok(found)
    if available is not None and available >= AMPLE_FRACTION * machine.ram_bytes:
        return note(f"{found}, with {gib(available)} free: no model need be among them")
    if rate < REREAD_BYTES_PER_S[Pressure.CRITICAL].enter:
        return warning(found, CLOSE)
    return problem(found, CLOSE)


def _other_servers(facts: Facts) -> Result:
    processes = facts.processes
    assert processes is not None
    servers = processes.other_servers
    if not servers:
        return ok("none runs")
    shown = [
        f"{server.name} holds {gib(server.held_bytes)}" if server.pid else f"{server.name} answers"
        for server in servers
    ]
    stop = "; ".join(dict.fromkeys(server.stop for server in servers))
    if any(server.held_bytes >= SMALL_MODEL_BYTES // 3 for server in servers):
        return warning(", ".join(shown), stop)
    return note(", ".join(shown), stop)


def _wired_limit(facts: Facts) -> Result:
    gpu, machine = facts.gpu, facts.machine
    assert gpu is not None
    assert machine is not None
    wired = gpu.wired_limit_bytes
    if wired is None:
        return ok("the system's own limit holds")
    found = f"iogpu.wired_limit_mb is set to {gib(wired)} of {gib(machine.ram_bytes)}"
    if wired * 100 > machine.ram_bytes * MAX_WIRED_PERCENT:
        return problem(found, "sudo sysctl iogpu.wired_limit_mb=0")
    return warning(found, "sudo sysctl iogpu.wired_limit_mb=0")


MAX_WIRED_PERCENT = 85
"""Above the largest share, 84 % of 128 GB, that macOS gives by itself."""

CHECKS = (
    Check(
        name="headroom",
        group=GROUP,
        why="A model is loaded only into memory that is free: what does not fit is refused, "
        "rather than swapped.",
        needs=("machine",),
        judge=_headroom,
    ),
    Check(
        name="programs",
        group=GROUP,
        why="Everything that other programs hold is missing for models.",
        needs=("processes", "machine"),
        judge=_programs,
    ),
    Check(
        name="swap",
        group=GROUP,
        why="What is swapped comes back at the speed of the disk; a model that is swapped decodes "
        "a hundred times slower.",
        needs=("conditions", "machine"),
        judge=_swap,
    ),
    Check(
        name="pressure",
        group=GROUP,
        why="Under pressure brim drops caches, then unloads models, and refuses new requests.",
        needs=("conditions", "machine"),
        judge=_pressure,
    ),
    Check(
        name="re-reads",
        group=GROUP,
        why="Mapped weights that memory drops are read from the disk again for the next token, "
        "without any swap: a tenth of the speed, or less.",
        needs=("rereads", "conditions", "machine"),
        judge=_rereads,
    ),
    Check(
        name="other-servers",
        group=GROUP,
        why="Another inference server keeps its models in the same memory and knows nothing of "
        "brim's; together they swap.",
        needs=("processes",),
        judge=_other_servers,
    ),
    Check(
        name="wired-limit",
        group=GROUP,
        why="What is wired for the GPU cannot be swapped or compressed; a raised limit starves "
        "the system and is the known trigger of kernel panics in the GPU's driver.",
        needs=("gpu", "machine"),
        judge=_wired_limit,
    ),
)
