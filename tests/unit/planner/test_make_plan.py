"""How load options are chosen, and what is refused."""

import msgspec
import pytest

from brim.core.machine import MachineSpec
from brim.core.model import ModelSpec
from brim.core.plan import Objective, Plan
from brim.errors import ConfigError
from brim.planner.plan import SHARED_LAYER_BYTES, largest_context, make_plan

CHOICES = {
    "context_tokens", "kv_tokens", "max_batch_tokens", "micro_batch_tokens", "num_threads",
    "environment", "kv_type", "flash_attention", "repack_weights",
}  # fmt: skip


def options(plan: Plan) -> tuple[str, str, bool, bool]:
    return plan.kv_type_k, plan.kv_type_v, plan.flash_attention, plan.repack_weights


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (Objective.DECODE, ("f16", "f16", True, True)),
        (Objective.PREFILL, ("f16", "f16", True, False)),
        (Objective.MEMORY, ("q8_0", "q8_0", True, False)),
    ],
)
def test_objective_decides_on_a_cpu(
    llama_1b: ModelSpec, laptop: MachineSpec, objective: Objective,
    expected: tuple[str, str, bool, bool],
) -> None:  # fmt: skip
    """On a CPU the objective decides KV type and repacking; flash attention is always on."""
    assert options(make_plan(llama_1b, laptop, engine="llamacpp", objective=objective)) == expected


@pytest.mark.parametrize("objective", list(Objective))
def test_a_gpu_takes_quantised_kv(
    llama_1b: ModelSpec, mac: MachineSpec, objective: Objective
) -> None:
    """Where a GPU shares the memory, KV is q8_0 with flash attention and weights stay mapped."""
    plan = make_plan(llama_1b, mac, engine="llamacpp", objective=objective)
    assert options(plan) == ("q8_0", "q8_0", True, False)


@pytest.mark.parametrize("engine", ["llamacpp", "toy"])
@pytest.mark.parametrize("objective", list(Objective))
@pytest.mark.parametrize("exact", [False, True])
def test_every_choice_has_its_reason(
    llama_1b: ModelSpec, laptop: MachineSpec, engine: str, objective: Objective, exact: bool
) -> None:
    """A plan gives a reason for each thing that it chose, and for nothing else."""
    plan = make_plan(llama_1b, laptop, engine=engine, objective=objective, exact_profile=exact)
    assert set(plan.reasons) == CHOICES
    assert all(plan.reasons.values())


def test_exact_profile(llama_1b: ModelSpec, laptop: MachineSpec) -> None:
    """The exact profile is q8_0 KV with flash attention, no repacking and no tiled products."""
    plan = make_plan(llama_1b, laptop, engine="llamacpp", exact_profile=True)
    assert options(plan) == ("q8_0", "q8_0", True, False)
    assert plan.environment["GGML_CPU_TILED_MM"] == "0"
    with pytest.raises(ConfigError, match="the exact profile is q8_0 KV"):
        make_plan(llama_1b, laptop, engine="llamacpp", exact_profile=True, kv_type="f16")


def test_a_tiny_model_runs_on_one_thread(llama_1b: ModelSpec, laptop: MachineSpec) -> None:
    """Where a layer is read before a second thread wakes up, there is no second thread."""
    for layer_bytes, expected in ((SHARED_LAYER_BYTES - 1, 1), (SHARED_LAYER_BYTES, 4)):
        spec = msgspec.structs.replace(llama_1b, weights_bytes=layer_bytes * llama_1b.num_layers)
        assert make_plan(spec, laptop, engine="llamacpp").num_batch_threads == expected
        assert make_plan(spec, laptop, engine="llamacpp", threads=2).num_batch_threads == 2


@pytest.mark.parametrize(("num_cores", "on_gpu"), [(1, 1), (2, 1), (8, 7)])
def test_a_single_row_takes_all_cores_of_a_cpu(
    llama_1b: ModelSpec, laptop: MachineSpec, mac: MachineSpec, num_cores: int, on_gpu: int
) -> None:
    """Decoding takes every core where a CPU computes, and leaves one free where a GPU does."""
    for machine, expected in ((laptop, num_cores), (mac, on_gpu)):
        machine = msgspec.structs.replace(machine, performance_cores=num_cores)
        plan = make_plan(llama_1b, machine, engine="llamacpp")
        assert (plan.num_threads, plan.num_batch_threads) == (expected, num_cores)


def test_threads_of_a_cpu_spin_briefly(
    llama_1b: ModelSpec, laptop: MachineSpec, mac: MachineSpec
) -> None:
    """Threads spin for less than a time slice where a CPU computes; elsewhere they sleep."""
    plan = make_plan(llama_1b, laptop, engine="llamacpp")
    assert plan.environment == {
        "GOMP_SPINCOUNT": "3000", "OMP_NUM_THREADS": "4",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    }  # fmt: skip
    assert make_plan(llama_1b, laptop, engine="llamacpp", threads=2).num_threads == 2
    on_gpu = make_plan(llama_1b, mac, engine="llamacpp")
    assert on_gpu.environment["OMP_WAIT_POLICY"] == "passive"


def test_default_context_is_at_most_what_was_trained(
    llama_1b: ModelSpec, laptop: MachineSpec
) -> None:
    """Nobody's wish gives 8,192 tokens, or the trained context where that is less."""
    assert make_plan(llama_1b, laptop, engine="llamacpp").context_tokens == 8192
    short = msgspec.structs.replace(llama_1b, trained_context_tokens=2048)
    assert make_plan(short, laptop, engine="llamacpp").context_tokens == 2048


def test_context_beyond_training_is_refused(llama_1b: ModelSpec, laptop: MachineSpec) -> None:
    """More than was trained is an error with both numbers."""
    with pytest.raises(ConfigError, match=r"131072 tokens; ask for at most that instead of 131073"):
        make_plan(llama_1b, laptop, engine="llamacpp", context_tokens=131_073)


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"context_tokens": 0}, "holds nothing"),
        ({"max_sequences": 0}, "must be 1 to 256"),
        ({"max_sequences": 257}, "must be 1 to 256"),
        ({"threads": 0}, "at least 1"),
        ({"kv_type": "int8"}, "no KV type named 'int8'"),
        ({"kv_type": "q8_0", "flash_attention": False}, "needs flash attention"),
        ({"engine": "onnx"}, "engine named 'onnx'"),
    ],
)
def test_wishes_that_cannot_be_met(
    llama_1b: ModelSpec, laptop: MachineSpec, wish: dict[str, object], message: str
) -> None:
    """A wish out of range, or against another one, is a ConfigError that says so."""
    with pytest.raises(ConfigError, match=message):
        make_plan(llama_1b, laptop, **{"engine": "llamacpp", **wish})  # type: ignore[arg-type]


def test_quantised_v_turns_flash_attention_on(llama_1b: ModelSpec, laptop: MachineSpec) -> None:
    """Asking for q8_0 KV alone turns flash attention on, and says why."""
    plan = make_plan(llama_1b, laptop, engine="llamacpp", kv_type="q8_0")
    assert plan.flash_attention
    assert plan.reasons["flash_attention"] == "a quantised V cache needs it"


def test_without_flash_attention_kv_is_f16(llama_1b: ModelSpec, mac: MachineSpec) -> None:
    """Turning flash attention off takes the planner's q8_0 back to f16."""
    plan = make_plan(llama_1b, mac, engine="llamacpp", flash_attention=False)
    assert options(plan) == ("f16", "f16", False, False)


def test_odd_heads_stay_f16(llama_1b: ModelSpec, mac: MachineSpec) -> None:
    """Heads that blocks of 32 do not divide are not quantised."""
    odd = msgspec.structs.replace(llama_1b, key_dim=80, value_dim=80)
    plan = make_plan(odd, mac, engine="llamacpp")
    assert (plan.kv_type_k, plan.kv_type_v) == ("f16", "f16")


@pytest.mark.parametrize(
    ("sequences", "context", "pool"),
    [(1, 8192, 8192), (12, 8192, 12288), (4, 8192, 8192), (16, 1000, 4096), (2, 700, 1536)],
)
def test_pool_holds_a_window_and_short_turns(
    llama_1b: ModelSpec, laptop: MachineSpec, sequences: int, context: int, pool: int
) -> None:
    """One window, or 1,024 tokens a sequence up to four windows, and none that nobody can fill."""
    roomy = msgspec.structs.replace(laptop, ram_bytes=2 * laptop.ram_bytes)
    plan = make_plan(
        llama_1b, roomy, engine="llamacpp", max_sequences=sequences, context_tokens=context
    )
    assert plan.kv_tokens == pool


def test_pool_is_one_window_where_ram_is_short(llama_1b: ModelSpec, laptop: MachineSpec) -> None:
    """A pool beyond one window is left out where it would cost over a sixteenth of RAM."""
    small = msgspec.structs.replace(laptop, ram_bytes=4 * 2**30)
    plan = make_plan(llama_1b, small, engine="llamacpp", max_sequences=16)
    assert plan.kv_tokens == 8192
    assert "1/16 of RAM" in plan.reasons["kv_tokens"]


def test_batches_hold_every_sequence(llama_1b: ModelSpec, laptop: MachineSpec) -> None:
    """A step has room for a row of each sequence, and for one whole micro batch."""
    plan = make_plan(llama_1b, laptop, engine="llamacpp", max_sequences=256)
    assert plan.max_batch_tokens >= plan.micro_batch_tokens >= plan.max_sequences


def test_toy_plan_is_tiny(llama_1b: ModelSpec, laptop: MachineSpec) -> None:
    """The toy engine's plan has no weights and costs little more than its process."""
    plan = make_plan(llama_1b, laptop, engine="toy", context_tokens=256)
    assert plan.memory.weights_bytes == plan.memory.compute_bytes == 0
    assert plan.environment == {}


@pytest.mark.parametrize("sequences", [1, 16])
def test_largest_context_fits_and_the_next_does_not(
    llama_1b: ModelSpec, laptop: MachineSpec, sequences: int
) -> None:
    """The largest context plans within the bytes given, and 256 tokens more would not."""

    def planned(context: int, free_bytes: int | None = None) -> Plan:
        return make_plan(
            llama_1b,
            laptop,
            engine="llamacpp",
            context_tokens=context,
            max_sequences=sequences,
            kv_type="f16",
            exact_profile=False,
            free_bytes=free_bytes,
        )

    plan = planned(8192)
    budget = planned(1024).memory.total_bytes + 10 * 2**20
    context = largest_context(plan, laptop, budget)
    assert context is not None
    fitting, longer = planned(context, budget), planned(context + 256, budget)
    assert fitting.repack_weights
    assert fitting.memory.total_bytes <= budget
    assert not longer.repack_weights or longer.memory.total_bytes > budget
    assert largest_context(plan, laptop, 1) is None


def test_largest_context_keeps_the_plan_as_it_is(llama_1b: ModelSpec, laptop: MachineSpec) -> None:
    """The exact profile repacks nothing, so nothing repacked stands in its way."""
    plan = make_plan(llama_1b, laptop, engine="llamacpp", exact_profile=True)
    shorter = make_plan(
        llama_1b, laptop, engine="llamacpp", exact_profile=True, context_tokens=4096
    )
    assert largest_context(plan, laptop, shorter.memory.total_bytes) == 4096
