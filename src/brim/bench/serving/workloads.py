"""The workloads by name."""

from collections.abc import Awaitable, Callable, Sequence

import msgspec

from brim.bench.serving.agents import agents
from brim.bench.serving.alone import cold, depth, restart, single
from brim.bench.serving.beside import shared_prefix, stall, throughput
from brim.bench.serving.mixed import Recorded, load_at_rates, some_at_a_time
from brim.bench.serving.session import Figure, Session
from brim.errors import ConfigError

RECORDED = "recorded"
"""Runs only where it is named: `load` sends the same requests as they would arrive."""


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that every server is asked to do."""

    name: str
    run: Callable[[Session], Awaitable[list[Figure]]]


def all_workloads(recorded: Recorded) -> dict[str, Workload]:
    """Every workload by name, in the order in which they run.

    Args:
        recorded: What the two workloads with recorded requests send.
    """
    found = {
        "single": single,
        "cold": cold,
        "stall": stall,
        "shared-prefix": shared_prefix,
        "agents": agents,
        "restart": restart,
        "throughput": throughput,
        "load": load_at_rates(recorded),
        "depth": depth,
        RECORDED: some_at_a_time(recorded),
    }
    return {name: Workload(name=name, run=run) for name, run in found.items()}


def choose(names: Sequence[str], recorded: Recorded) -> list[Workload]:
    """The named workloads, each once; without names all but `recorded`.

    Raises:
        ConfigError: A name is none; says which there are.
    """
    known = all_workloads(recorded)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(f"there is no workload '{unknown[0]}'; there are {', '.join(known)}")
    wanted = list(dict.fromkeys(names)) or [name for name in known if name != RECORDED]
    return [known[name] for name in wanted]
