"""Plans as a whole: whatever the model, more is never cheaper, and the room is kept."""

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from brim.core.machine import MachineSpec
from brim.core.model import KvLayer, ModelSpec
from brim.core.plan import Objective, Plan
from brim.planner.fit import Room, fit_plan
from brim.planner.mlx_kv import mlx_kv_bytes
from brim.planner.plan import make_plan

GIB = 2**30


@st.composite
def models(draw: st.DrawFn) -> ModelSpec:
    """Dense and windowed models from a few million parameters to tens of billions."""
    heads = draw(st.sampled_from([4, 8, 32, 64]))
    kv_heads = heads // draw(st.sampled_from([1, 2, 4]))
    num_layers = draw(st.integers(2, 80))
    key_dim = draw(st.sampled_from([64, 96, 128]))
    window = draw(st.sampled_from([None, 512, 4096]))
    layers = tuple(
        KvLayer(
            key_width=kv_heads * key_dim,
            value_width=kv_heads * key_dim,
            window_tokens=window if number % 2 else None,
        )
        for number in range(num_layers)
    )
    hidden = heads * key_dim
    parameters = num_layers * 12 * hidden * hidden
    num_bytes = parameters * 9 // 16
    return ModelSpec(
        name="m", paths=(), format="gguf", architecture="gemma3" if window else "llama",
        fingerprint="f", num_parameters=parameters, weights_bytes=num_bytes,
        num_layers=num_layers, hidden_size=hidden, num_heads=heads,
        num_kv_heads=(kv_heads,) * num_layers, key_dim=key_dim, value_dim=key_dim,
        vocab_size=draw(st.sampled_from([32_000, 151_936])), trained_context_tokens=131_072,
        feed_forward_size=4 * hidden, kv_layers=layers, active_bytes=num_bytes,
        active_parameters=parameters, matrix_bytes={"Q4_K": num_bytes}, quant="Q4_K_M",
    )  # fmt: skip


@st.composite
def machines(draw: st.DrawFn) -> MachineSpec:
    """From a small laptop to a large desktop, with and without a GPU that shares the memory."""
    ram = draw(st.sampled_from([8, 16, 64, 512])) * GIB
    return MachineSpec(
        name="x", system="linux", ram_bytes=ram, others_bytes=ram // 4,
        gpu_limit_bytes=draw(st.sampled_from([None, ram * 3 // 4])),
        performance_cores=draw(st.integers(1, 16)),
    )  # fmt: skip


contexts = st.integers(1, 131_072)
sequences = st.integers(1, 256)
engines = st.sampled_from(["llamacpp", "mlx"])


def total(plan: Plan) -> int:
    return plan.memory.total_bytes


def comparable(plan: Plan) -> int:
    """All bytes, but for scratch that llama.cpp's allocator may pack better in a larger graph.

    By how much is held down in test_memory_forecast.py; MLX's only ever grows.
    """
    packed = plan.memory.compute_bytes if plan.engine == "llamacpp" else 0
    return plan.memory.total_bytes - packed


@settings(deadline=None)
@given(models(), machines(), engines, contexts, contexts, sequences)
def test_more_context_never_costs_less(
    model: ModelSpec, machine: MachineSpec, engine: str, first: int, second: int, num: int
) -> None:
    """Of two contexts the longer one takes at least as many bytes."""

    def planned(context: int) -> Plan:
        return make_plan(model, machine, engine=engine, context_tokens=context, max_sequences=num)

    less, more = planned(min(first, second)), planned(max(first, second))
    assert less.kv_tokens <= more.kv_tokens
    assert comparable(less) <= comparable(more)


@settings(deadline=None)
@given(models(), machines(), engines, contexts, sequences, sequences)
def test_more_sequences_never_cost_less(
    model: ModelSpec, machine: MachineSpec, engine: str, context: int, first: int, second: int
) -> None:
    """Of two numbers of sequences the larger one takes at least as many bytes."""

    def planned(num: int) -> Plan:
        return make_plan(model, machine, engine=engine, context_tokens=context, max_sequences=num)

    less, more = planned(min(first, second)), planned(max(first, second))
    assert less.kv_tokens <= more.kv_tokens
    assert comparable(less) <= comparable(more)


@settings(deadline=None)
@given(models(), machines(), contexts)
def test_more_bits_never_cost_less(model: ModelSpec, machine: MachineSpec, context: int) -> None:
    """KV types of more bits take at least as many bytes a token, of which a pool may hold fewer."""
    plans = [
        make_plan(
            model, machine, engine="llamacpp", context_tokens=context, kv_type=kv_type,
            flash_attention=True,
        )
        for kv_type in ("q4_0", "q5_0", "q8_0", "f16", "f32")
    ]  # fmt: skip
    sizes = [plan.memory.kv_bytes / plan.kv_tokens for plan in plans]
    assert sizes == sorted(sizes)


@settings(deadline=None)
@given(models(), st.integers(1, 2**20), sequences, st.sampled_from(["F32", "BF16"]))
def test_more_bits_never_cost_less_on_mlx(
    model: ModelSpec, tokens: int, num: int, dtype: str
) -> None:
    """4 bits take less than 8, and 8 less than floats, where a layer looks back without end."""
    model = msgspec.structs.replace(model, matrix_bytes={dtype: 1})
    sizes = [
        mlx_kv_bytes(
            model, kv_tokens=tokens, max_sequences=num, kv_type_k=kv_type, kv_type_v=kv_type
        )
        for kv_type in ("q4_0", "q8_0", "f16")
    ]
    assert sizes[0] < sizes[1] < sizes[2]


@settings(deadline=None)
@given(models(), machines(), engines, st.sampled_from(Objective), st.integers(0, 600), sequences)
def test_a_plan_that_can_stay_within_its_room_does(
    model: ModelSpec, machine: MachineSpec, engine: str, objective: Objective, gib: int, num: int
) -> None:
    """Whatever room is left, a fitted plan is within it, or is the wish that nothing could fit."""
    room = Room(gib * GIB * 2 // 3, gib * GIB)
    plan = fit_plan(model, machine, room, engine=engine, objective=objective, max_sequences=num)
    if total(plan) <= room.tight_bytes:
        return
    least = make_plan(
        model, machine, engine=engine, objective=Objective.MEMORY, max_sequences=num,
        context_tokens=2048, free_bytes=room.tight_bytes,
    )  # fmt: skip
    assert total(least) > room.tight_bytes


@settings(deadline=None)
@given(models(), machines(), contexts)
def test_an_active_byte_is_a_byte_of_the_file(
    model: ModelSpec, machine: MachineSpec, context: int
) -> None:
    """Weights of a plan are the file's bytes, whatever the machine, and the sum is of its terms."""
    memory = make_plan(model, machine, engine="llamacpp", context_tokens=context).memory
    assert memory.weights_bytes == model.weights_bytes
    parts = msgspec.structs.asdict(memory)
    names = ("weights_bytes", "repacked_bytes", "kv_bytes", "compute_bytes", "overhead_bytes")
    assert memory.total_bytes == sum(parts[name] for name in names)
