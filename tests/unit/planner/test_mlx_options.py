"""How a model is loaded by MLX: what is chosen, why, and what is refused."""

import msgspec
import pytest

from brim.core.machine import MachineSpec
from brim.core.model import KvLayer, ModelSpec
from brim.core.plan import Objective, Plan
from brim.errors import ConfigError
from brim.planner.mlx_limits import mlx_environment
from brim.planner.mlx_memory import freed_arrays_limit_bytes
from brim.planner.mlx_options import wires_weights
from brim.planner.plan import make_plan

GIB = 2**30

CHOICES = {
    "context_tokens", "kv_tokens", "max_batch_tokens", "micro_batch_tokens", "num_threads",
    "environment", "kv_type", "flash_attention", "repack_weights", "wire_weights",
}  # fmt: skip


def planned(spec: ModelSpec, machine: MachineSpec, **wishes: object) -> Plan:
    return make_plan(spec, machine, engine="mlx", **wishes)  # type: ignore[arg-type]


@pytest.mark.parametrize("objective", list(Objective))
def test_every_choice_has_its_reason(
    llama_1b: ModelSpec, mac: MachineSpec, objective: Objective
) -> None:
    """A plan for MLX gives a reason for each thing that it chose, wiring among them."""
    plan = planned(llama_1b, mac, objective=objective)
    assert set(plan.reasons) == CHOICES
    assert all(plan.reasons.values())
    assert (plan.num_threads, plan.flash_attention, plan.repack_weights) == (1, True, False)
    assert not plan.wire_weights


def test_kv_is_f16_unless_memory_asks(llama_1b: ModelSpec, mac: MachineSpec) -> None:
    """f16 is quicker; q8_0 is taken for memory, by objective or where f16 does not fit."""
    assert planned(llama_1b, mac).kv_type_k == "f16"
    # At a long context what 8 bits save is more than what unfused scores take, at a short one not.
    wishes = {"context_tokens": 65_536}
    frugal = planned(llama_1b, mac, objective=Objective.MEMORY, **wishes)
    assert (frugal.kv_type_k, frugal.kv_type_v) == ("q8_0", "q8_0")
    short = planned(llama_1b, mac, objective=Objective.MEMORY, context_tokens=2048)
    assert short.kv_type_k == "f16"
    assert "saves less here than its scores take" in short.reasons["kv_type"]
    tight = planned(llama_1b, mac, **wishes).memory.total_bytes - 1
    squeezed = planned(llama_1b, mac, free_bytes=tight, **wishes)
    assert squeezed.kv_type_k == "q8_0"
    assert squeezed.memory.total_bytes <= tight
    assert squeezed.reasons["kv_type"].startswith("memory needs it")


def test_what_cannot_be_quantised_falls_back_with_its_reason(
    llama_1b: ModelSpec, mac: MachineSpec
) -> None:
    """Attention sinks keep f16 where the planner chooses, and refuse q8_0 where it is asked for."""
    sinks = msgspec.structs.replace(llama_1b, architecture="gpt-oss")
    plan = planned(sinks, mac, objective=Objective.MEMORY)
    assert plan.kv_type_k == "f16"
    assert "attention sinks" in plan.reasons["kv_type"]
    with pytest.raises(ConfigError, match="attention sinks"):
        planned(sinks, mac, kv_type="q8_0")


def test_a_plan_says_which_share_stays_unquantised(llama_1b: ModelSpec, mac: MachineSpec) -> None:
    """Windows beside full layers keep their type, and the reason gives their part of the bytes."""
    full = KvLayer(key_width=512, value_width=512)
    window = msgspec.structs.replace(full, window_tokens=1024)
    spec = msgspec.structs.replace(llama_1b, kv_layers=(window, full) * 8)
    reason = planned(spec, mac, kv_type="q8_0").reasons["kv_type"]
    assert reason == "asked for; 23 % of its bytes stay unquantised: layers with a window cannot be"
    assert planned(llama_1b, mac, kv_type="q8_0").reasons["kv_type"] == "asked for"


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"kv_type": "q8_0/f16"}, "MLX stores K and V in one type"),
        ({"flash_attention": False}, "fused attention is its only one; leave flash attention on"),
        ({"threads": 4}, "MLX has no threads to set.*leave threads out"),
        ({"exact_profile": True}, "nobody has shown that MLX on a GPU .* leave the exact profile"),
    ],
)
def test_wishes_that_mlx_cannot_meet(
    llama_1b: ModelSpec, mac: MachineSpec, wish: dict[str, object], message: str
) -> None:
    """What MLX would silently do otherwise is an error that says what to do."""
    with pytest.raises(ConfigError, match=message):
        planned(llama_1b, mac, **wish)


def test_the_exact_profile_on_a_cpu_is_mlx_as_it_is(
    llama_1b: ModelSpec, laptop: MachineSpec
) -> None:
    """Without a GPU every row is computed the same whatever the batch, so nothing changes."""
    assert planned(llama_1b, laptop, exact_profile=True) == planned(llama_1b, laptop)


def test_the_environment_is_that_of_the_device(
    llama_1b: ModelSpec, mac: MachineSpec, laptop: MachineSpec
) -> None:
    """A plan has what MLX needs before it starts, for the device that it computes on, and why."""
    for machine in (mac, laptop):
        environment, reason = mlx_environment(on_gpu=machine is mac)
        plan = planned(llama_1b, machine)
        assert (plan.environment, plan.reasons["environment"]) == (environment, reason)


@pytest.mark.parametrize(
    ("changes", "num_sequences", "is_alone", "wires"),
    [
        ({}, 1, True, True),
        ({}, 2, True, False),
        ({}, 1, False, False),
        ({"weights_bytes": 28 * GIB}, 1, True, False),
        ({"weights_bytes": 45 * GIB}, 1, True, False),
    ],
)
def test_weights_are_wired_for_one_large_model_alone(
    llama_1b: ModelSpec,
    mac: MachineSpec,
    changes: dict[str, int],
    num_sequences: int,
    is_alone: bool,
    wires: bool,
) -> None:
    """One sequence, one model, over 60 % of the GPU limit, and 35 % of RAM left; nothing else."""
    studio = msgspec.structs.replace(mac, ram_bytes=64 * GIB, gpu_limit_bytes=48 * GIB)
    spec = msgspec.structs.replace(llama_1b, **({"weights_bytes": 36 * GIB} | changes))
    plan = planned(spec, studio, max_sequences=num_sequences, is_only_model=is_alone)
    assert plan.wire_weights is wires
    assert plan.reasons["wire_weights"]


def test_small_machines_and_processors_never_wire(
    llama_1b: ModelSpec, mac: MachineSpec, laptop: MachineSpec
) -> None:
    """Less than 8 GiB left is too little to wire beside; a processor has nothing to wire for."""
    large = msgspec.structs.replace(llama_1b, weights_bytes=9 * GIB)
    for machine in (mac, laptop):
        wires, reason = wires_weights(large, machine, max_sequences=1, is_only_model=True)
        assert not wires
        assert reason


def test_compute_is_one_evaluation_and_the_cache_of_its_arrays(
    llama_1b: ModelSpec, mac: MachineSpec, laptop: MachineSpec
) -> None:
    """Half of the term is for freed arrays; a CPU's scores and f32 copies are counted."""
    gpu, cpu = (planned(llama_1b, machine).memory for machine in (mac, laptop))
    assert freed_arrays_limit_bytes(gpu.compute_bytes) * 2 == gpu.compute_bytes
    rows = 512 * (12 * 2048 + 2 * 8192)
    logits = 4 * 128_256 * (6 + 20)
    assert gpu.compute_bytes == 2 * (2 * rows + logits)
    # 64 MiB of scores at most and a quarter more for masks; rows of f16 are computed in f32.
    assert cpu.compute_bytes == 2 * (4 * rows + logits + 80 * 2**20)
    assert gpu.mapped_bytes == 0
    assert gpu.load_peak_bytes == gpu.total_bytes


def test_windows_that_move_are_there_twice(llama_1b: ModelSpec, laptop: MachineSpec) -> None:
    """A prompt longer than a window's buffer moves all windows at once, and a shorter one none."""
    full = KvLayer(key_width=512, value_width=512)
    window = msgspec.structs.replace(full, window_tokens=1024)
    plain, windowed = (
        msgspec.structs.replace(llama_1b, kv_layers=layers * 8)
        for layers in ((full, full), (window, full))
    )

    def added_bytes(context: int) -> int:
        without, with_windows = (
            planned(spec, laptop, context_tokens=context).memory for spec in (plain, windowed)
        )
        return with_windows.compute_bytes - without.compute_bytes

    assert added_bytes(1280) == 0
    assert added_bytes(1536) == 2 * 8 * 1280 * 2048
