"""The engine that is chosen, whatever exists, is installed, fits and is known."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brim.core.machine import MachineSpec
from brim.errors import ConfigError
from brim.planner.engine_choice import NAMES, choose_engine, default_engine
from brim.planner.fit import Room
from brim.registry.catalogue import find

GIB = 2**30

ENTRY = find("Llama-3.2-1B-Instruct")[0]
FORMS = {
    "llamacpp": ENTRY.spec("Q4_K_M", ENTRY.name),
    "mlx": ENTRY.spec("MLX 4bit", ENTRY.name),
}


@given(
    ram_gib=st.integers(4, 512),
    has_gpu=st.booleans(),
    system=st.sampled_from(["linux", "darwin"]),
    names=st.sets(st.sampled_from(["llamacpp", "mlx"]), min_size=1),
    available=st.sets(st.sampled_from(["llamacpp", "mlx", "toy"])),
    weights_gib=st.integers(1, 64),
    room_gib=st.none() | st.tuples(st.integers(0, 64), st.integers(0, 64)),
    costs=st.dictionaries(st.sampled_from(["llamacpp", "mlx"]), st.none() | st.floats(0, 20)),
)
def test_the_choice_is_always_usable(
    ram_gib: int, has_gpu: bool, system: str, names: set[str],
    available: set[str], weights_gib: int, room_gib: tuple[int, int] | None,
    costs: dict[str, float | None],
) -> None:  # fmt: skip
    """It has a form and is installed, is the same each time, and has a reason."""
    machine = MachineSpec(
        name="x", system=system, ram_bytes=ram_gib * GIB, others_bytes=GIB,
        gpu_limit_bytes=ram_gib * GIB * 3 // 4 if has_gpu else None,
    )  # fmt: skip
    forms = {
        name: msgspec.structs.replace(FORMS[name], weights_bytes=weights)
        for name, weights in zip(sorted(names), (weights_gib * GIB, GIB), strict=False)
    }
    room = None if room_gib is None else Room(min(room_gib) * GIB, max(room_gib) * GIB)

    def choose() -> tuple[str, str]:
        choice = choose_engine(
            forms, machine, available=frozenset(available), room=room,
            perplexity_increase_percent=costs,
        )  # fmt: skip
        return choice.engine, choice.reason

    if not names & available:
        with pytest.raises(ConfigError):
            choose()
        return
    engine, reason = choose()
    assert engine in names & available
    assert reason
    assert choose() == (engine, reason)
    default = default_engine(machine)
    if engine != default and {default, engine} <= names & available:
        assert NAMES[engine] in reason
