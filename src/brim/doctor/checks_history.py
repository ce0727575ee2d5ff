"""What went down lately, and what it left behind."""

from collections import Counter

from brim.core.event import EventKind
from brim.doctor.facts import Facts
from brim.doctor.finding import Check, Result, note, ok, problem, warning
from brim.doctor.words import count, some

GROUP = "history"

MANY_DEATHS = 3
"""As many in a week as put a model in quarantine when they come in a row."""


def _worker_deaths(facts: Facts) -> Result:
    crashes = facts.crashes
    assert crashes is not None
    events = crashes.worker_events
    if not events:
        return ok("none in seven days")
    deaths = Counter(e.model for e in events if e.kind is EventKind.WORKER_DIED)
    quarantined = [e.model for e in events if e.kind is EventKind.MODEL_QUARANTINED]
    stuck = [e.model for e in events if e.kind is EventKind.UNLOAD_FAILED]
    parts = [f"{count(num, 'death')} of {name}'s worker" for name, num in deaths.most_common()]
    parts += [f"{name} went into quarantine" for name in dict.fromkeys(quarantined)]
    parts += [f"memory of {name} did not come back at once" for name in dict.fromkeys(stuck)]
    found = f"in seven days: {some(parts)}; last: {events[-1].cause or events[-1].kind.value}"
    mend = "brim events says more; where memory was short, serve with a smaller --ctx or quant"
    if quarantined or max(deaths.values(), default=0) >= MANY_DEATHS:
        return warning(found, mend)
    return note(found, "brim events")


def _panics(facts: Facts) -> Result:
    crashes = facts.crashes
    assert crashes is not None
    if crashes.panics:
        return problem(
            f"{count(len(crashes.panics), 'panic')} in the GPU's memory in 30 days: "
            f"{some(crashes.panics)}",
            "sudo sysctl iogpu.wired_limit_mb=0, update macOS, and stop other servers that use "
            "MLX with a wired limit",
        )
    if crashes.other_panics:
        return note(
            f"{count(len(crashes.other_panics), 'panic')} in 30 days, of another kind: "
            f"{some(crashes.other_panics)}",
            "open /Library/Logs/DiagnosticReports",
        )
    return ok("none in 30 days")


def _oom_kills(facts: Facts) -> Result:
    crashes = facts.crashes
    assert crashes is not None
    num, victims = crashes.num_oom_kills, crashes.oom_victims
    if not num and not victims:
        return ok("none" if num == 0 else "the system counts none that we may see")
    number = num or len(victims)
    what = "1 process" if number == 1 else f"{number} processes"
    when = "since this container or service began" if num else "in seven days"
    found = f"the kernel killed {what} for want of memory {when}"
    if victims:
        found += f": {some(list(reversed(victims)))}"
    mend = "raise the limit of the container or service, or serve fewer models: brim ps"
    if any("python" in victim or "brim" in victim for victim in victims):
        return warning(found, mend)
    return note(found, mend)


def _stale_state(facts: Facts) -> Result:
    stale = facts.stale
    assert stale is not None
    if stale.orphans:
        pids = " ".join(str(pid) for pid in stale.orphans)
        return problem(
            f"{count(len(stale.orphans), 'worker')} of a server that was killed still holds "
            f"memory (pid {pids})",
            f"kill -9 {pids}, or start brim serve, which ends them",
        )
    if stale.damaged:
        return note(
            f"{some(list(stale.damaged))} was damaged and put aside; a new one was begun",
            f"rm '{stale.damaged[0]}'",
        )
    if stale.files:
        return note(
            f"{count(len(stale.files), 'file')} of servers that ended without a word: "
            f"{some(list(stale.files))}",
            "the next brim serve removes those of servers and workers; the others can be deleted",
        )
    return ok("nothing was left behind")


CHECKS = (
    Check(
        name="worker-deaths",
        group=GROUP,
        why="A worker that dies takes the answers with it that had begun; memory that others "
        "took is the usual cause.",
        needs=("crashes",),
        judge=_worker_deaths,
    ),
    Check(
        name="kernel-panics",
        group=GROUP,
        why="The GPU's driver panics where much memory is wired and freed at once; it takes the "
        "whole machine down.",
        needs=("crashes",),
        judge=_panics,
    ),
    Check(
        name="oom-kills",
        group=GROUP,
        why="The kernel kills the largest process when a limit is reached, and a model's worker "
        "is the largest.",
        needs=("crashes",),
        judge=_oom_kills,
    ),
    Check(
        name="stale-state",
        group=GROUP,
        why="A worker that outlived its server holds its memory for nobody.",
        needs=("stale",),
        judge=_stale_state,
    ),
)
