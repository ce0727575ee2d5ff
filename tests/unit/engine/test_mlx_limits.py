"""What MLX is held to: the plan's bytes, wired or not, and rows of one evaluation."""

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from support.models import plan_for

from brim.core.memory import MemoryTerms
from brim.core.model import KvLayer, ModelSpec
from brim.core.plan import Plan
from brim.planner import mlx_limits
from brim.planner.mlx_limits import mlx_environment, rows_of_evaluation, wired_limit_bytes

mx: Any = pytest.importorskip("mlx.core")

from brim.engine.mlx import limits

MIB = 1024 * 1024
TERMS = MemoryTerms(
    weights_bytes=300 * MIB, kv_bytes=50 * MIB, compute_bytes=20 * MIB, overhead_bytes=70 * MIB
)


@pytest.fixture
def limits_as_before() -> Iterator[None]:
    """Gives MLX its limits back."""
    memory, cache = mx.get_memory_limit(), mx.set_cache_limit(0)
    mx.set_cache_limit(cache)
    yield
    mx.set_memory_limit(memory)
    mx.set_cache_limit(cache)


def planned(**changes: Any) -> Plan:
    return msgspec.structs.replace(plan_for("toy"), engine="mlx", memory=TERMS, **changes)


def spec_of(*, window: int | None = None, has_attention: bool = True, heads: int = 32) -> ModelSpec:
    """8 B parameters of 32 layers and heads of 128 values."""
    width = 1024 if has_attention else 0
    layer = KvLayer(key_width=width, value_width=width, window_tokens=window)
    return ModelSpec(
        name="x", paths=(), format="safetensors", architecture="llama", fingerprint="",
        num_parameters=8_000_000_000, weights_bytes=8, num_layers=32, hidden_size=4096,
        num_heads=heads, num_kv_heads=(8,) * 32, key_dim=128, value_dim=128, vocab_size=128_000,
        trained_context_tokens=131_072, kv_layers=(layer,) * 32,
    )  # fmt: skip


@pytest.mark.usefixtures("limits_as_before")
def test_limits_are_the_plans_terms() -> None:
    """MLX may hold weights, KV and compute, and of freed arrays half the compute term."""
    limits.set_limits(planned())
    assert mx.get_memory_limit() == 370 * MIB
    assert mx.set_cache_limit(0) == 10 * MIB


@pytest.mark.usefixtures("limits_as_before")
def test_a_plan_without_a_forecast_leaves_mlx_its_own_limits() -> None:
    """A memory limit of no bytes would have MLX wait before every array."""
    before = mx.get_memory_limit()
    limits.set_limits(plan_for("toy"))
    assert mx.get_memory_limit() == before


@pytest.mark.usefixtures("limits_as_before")
def test_a_smaller_pool_lowers_the_limit_by_its_bytes() -> None:
    """And the plan's own gives the plan's limit again; without a forecast nothing is touched."""
    plan = planned()
    limits.set_pool(plan, plan.kv_tokens // 5)
    assert mx.get_memory_limit() == pytest.approx(330 * MIB, abs=MIB)
    limits.set_pool(plan_for("toy"), 256)
    assert mx.get_memory_limit() == pytest.approx(330 * MIB, abs=MIB)
    limits.set_pool(plan, plan.kv_tokens)
    assert mx.get_memory_limit() == 370 * MIB


@pytest.mark.parametrize("wire_weights", [False, True])
@pytest.mark.usefixtures("limits_as_before")
def test_on_a_gpu_the_wired_limit_is_always_set(
    wire_weights: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is wired unless the plan says so, and then no more than the device recommends."""
    wired: list[int] = []
    monkeypatch.setattr(limits, "is_on_gpu", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 200 * MIB})
    monkeypatch.setattr(mx, "set_wired_limit", wired.append)
    limits.set_limits(planned(wire_weights=wire_weights))
    assert wired == [200 * MIB if wire_weights else 0]


def test_weights_alone_are_wired() -> None:
    """KV and scratch come and go, and are left to the system even where weights are wired."""
    assert wired_limit_bytes(planned(wire_weights=True), 1000 * MIB) == 300 * MIB
    assert wired_limit_bytes(planned(), 1000 * MIB) == 0


def test_a_footprint_adds_up_to_what_mlx_holds() -> None:
    """Weights, KV, scratch and the rest are all active and cached bytes, none of them mapped."""
    kept = mx.zeros((4 * MIB,), mx.uint8)
    mx.eval(kept)
    held = mx.get_active_memory() + mx.get_cache_memory()
    found = limits.footprint(planned(), 1 * MIB, 2 * MIB)
    assert (found.weights_bytes, found.kv_bytes, found.mapped_weights_bytes) == (MIB, 2 * MIB, 0)
    assert found.dirty_bytes == held
    assert 0 < found.compute_bytes <= TERMS.compute_bytes


def test_scratch_beyond_the_plan_is_named_as_such() -> None:
    """What is alive over the plan's compute term is among other bytes."""
    kept = mx.zeros((32 * MIB,), mx.uint8)
    mx.eval(kept)
    found = limits.footprint(planned(), 0, 0)
    assert found.compute_bytes == TERMS.compute_bytes
    assert found.other_bytes >= 12 * MIB


def test_trimming_gives_freed_arrays_back() -> None:
    """After a trim the cache of freed arrays is empty."""
    mx.set_cache_limit(before := mx.set_cache_limit(64 * MIB))
    mx.set_cache_limit(64 * MIB)
    try:
        array = mx.zeros((8 * MIB,), mx.uint8)
        mx.eval(array)
        del array
        assert mx.get_cache_memory() >= 8 * MIB
        limits.trim()
        assert mx.get_cache_memory() == 0
    finally:
        mx.set_cache_limit(before)


def test_trimming_waits_for_the_device_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays that a running command may use are not freed under it."""
    calls: list[str] = []
    monkeypatch.setattr(mx, "synchronize", lambda: calls.append("synchronize"))
    monkeypatch.setattr(mx, "clear_cache", lambda: calls.append("clear_cache"))
    limits.trim()
    assert calls == ["synchronize", "clear_cache"]


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("num_held", [0, 100, 5_000, 40_000, 130_000, 1_000_000])
def test_one_evaluation_is_bounded_at_any_context(num_held: int, is_fused: bool) -> None:
    """Rows are 16 at least and a multiple of it, and above that attention is within its limit."""
    spec = spec_of()
    rows = rows_of_evaluation(spec, num_held, 2048, is_fused=is_fused)
    assert rows % 16 == 0
    assert 16 <= rows <= 2048
    flops = 2 * spec.num_heads * (spec.key_dim + spec.value_dim) * rows * (num_held + rows)
    if rows > 16:
        assert flops <= mlx_limits.ATTENTION_LIMIT_S * mlx_limits.GPU_FLOPS
        if not is_fused:
            scores = 2 * spec.num_heads * rows * (num_held + rows)
            assert scores <= mlx_limits.MAX_SCORES_BYTES


def test_a_longer_context_never_takes_more_rows() -> None:
    """Rows fall as the context grows, and whole prompts are taken where it is short."""
    rows = [rows_of_evaluation(spec_of(), held, 512) for held in range(0, 200_000, 1_000)]
    assert rows == sorted(rows, reverse=True)
    assert (rows[0], rows[-1]) == (512, 32)


@pytest.mark.parametrize("num_rows", [1, 15, 17, 33])
def test_no_more_rows_than_there_are(num_rows: int) -> None:
    """The end of a prompt is computed as long as it is."""
    assert rows_of_evaluation(spec_of(), 0, num_rows) == num_rows
    assert rows_of_evaluation(spec_of(), 10**7, num_rows) == min(num_rows, 16)


def test_windows_and_states_bound_what_a_row_sees() -> None:
    """Where no layer looks back further than its window, a long context takes as many rows."""
    assert rows_of_evaluation(spec_of(window=1024), 10**6, 512) == 512
    assert rows_of_evaluation(spec_of(has_attention=False), 10**6, 512) == 512


@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="a GPU fuses attention")
def test_a_processor_never_fuses_attention() -> None:
    """On a CPU the bound on scores holds for every type of KV."""
    spec = spec_of()
    bounded = rows_of_evaluation(spec, 20_000, 512, is_fused=False)
    assert bounded < rows_of_evaluation(spec, 20_000, 512)
    assert limits.rows_of_evaluation(spec, 20_000, 512) == bounded


def test_a_processor_compiles_nothing_at_run_time() -> None:
    """Without a GPU MLX's compiler is off: it would run g++ and load what lies in /tmp."""
    environment, reason = mlx_environment(on_gpu=False)
    assert environment == {"MLX_DISABLE_COMPILE": "1"}
    assert "g++" in reason


def test_residency_is_renewed_only_for_wired_weights() -> None:
    """On a GPU nothing is set but the refresh of weights that the plan wires."""
    assert mlx_environment(on_gpu=True)[0] == {}
    wired, _ = mlx_environment(on_gpu=True, wire_weights=True)
    assert wired == {"MLX_METAL_RESIDENCY_REFRESH_INTERVAL_MS": "1000"}
