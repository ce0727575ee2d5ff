"""Properties of the speed forecast for Macs: on one chip more machine or less work is no slower."""

import itertools
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brim.core.forecast import SpeedForecast, SpeedShape
from brim.core.machine import MachineSpec
from brim.core.model import KvLayer
from brim.machine.chips import chips, machine_of
from brim.planner.apple.speed import forecast_apple

MACHINES = tuple(machine_of(chip, chip.ram_gb[0]) for chip in chips())
QUANTS = {
    "llamacpp": ("Q2_K", "Q3_K_M", "IQ4_XS", "Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "F16"),
    "mlx": ("MLX 2bit", "MLX 3bit", "MLX 4bit", "MLX 6bit", "MLX 8bit", "BF16"),
}
KV_TYPES = ("q4_0", "q5_0", "q8_0", "f16", "f32")
"""From few bits to many."""

ENGINES = st.sampled_from(sorted(QUANTS))


@st.composite
def shapes(draw: st.DrawFn, engine: str = "llamacpp") -> SpeedShape:
    """Models from 50 M to 100 B weights: dense or with experts, with windows or recurrent."""
    num_layers, kv_heads = draw(st.integers(2, 100)), draw(st.sampled_from([1, 2, 8, 16]))
    heads = kv_heads * draw(st.sampled_from([1, 4, 5, 8]))
    num_experts = draw(st.sampled_from([0, 8, 128]))
    num_bytes = draw(st.integers(2**25, 2**36))
    layer = KvLayer(
        key_width=kv_heads * 128, value_width=kv_heads * 128,
        window_tokens=draw(st.sampled_from([None, None, 1024])),
    )  # fmt: skip
    return SpeedShape(
        num_layers=num_layers, hidden_size=heads * 128, num_heads=heads, num_kv_heads=kv_heads,
        key_dim=128, vocab_size=draw(st.sampled_from([32_000, 262_144])), active_bytes=num_bytes,
        weights_bytes=num_bytes * (draw(st.integers(1, 20)) if num_experts else 1),
        active_parameters=2 * num_bytes, kv_layers=(layer,) * num_layers,
        num_experts=num_experts, num_active_experts=min(num_experts, 4),
        num_recurrent_layers=draw(st.sampled_from([0, num_layers // 2])),
        quant=draw(st.sampled_from(QUANTS[engine])),
    )  # fmt: skip


def forecast(shape: SpeedShape, machine: MachineSpec, engine: str, **changes: Any) -> SpeedForecast:
    options: dict[str, Any] = {
        "kv_type_k": "f16", "kv_type_v": "f16", "flash_attention": True, "depth_tokens": 2048,
        "prompt_tokens": 512, "num_sequences": 1,
    }  # fmt: skip
    found = forecast_apple(shape, machine, engine=engine, **(options | changes))
    assert found is not None
    return found


def is_no_slower(one: SpeedForecast, other: SpeedForecast) -> bool:
    """Whether the first decodes and reads prompts as fast as the other; rounding aside."""
    return all(
        getattr(one, kind).expected >= getattr(other, kind).expected * (1 - 1e-9)
        for kind in ("decode_tok_s", "prefill_tok_s")
    )


BINS = [
    (less, more)
    for less, more in itertools.permutations(MACHINES, 2)
    if less.chip == more.chip
    and (less.gpu_cores or 0) <= (more.gpu_cores or 0)
    and (less.memory_bandwidth or 0) <= (more.memory_bandwidth or 0)
]


@pytest.mark.parametrize(("less", "more"), BINS, ids=lambda machine: machine.name)
@settings(max_examples=12, deadline=None)
@given(data=st.data(), engine=ENGINES, depth=st.sampled_from([0, 2048, 65_536]))
def test_a_better_bin_of_a_chip_is_no_slower(
    less: MachineSpec, more: MachineSpec, data: st.DataObject, engine: str, depth: int
) -> None:
    """More GPU cores and bandwidth of the same chip never slow anything, whoever measured them."""
    shape = data.draw(shapes(engine))
    better, worse = (forecast(shape, mac, engine, depth_tokens=depth) for mac in (more, less))
    assert is_no_slower(better, worse)


@settings(max_examples=200, deadline=None)
@given(
    data=st.data(), engine=ENGINES, mac=st.sampled_from(MACHINES), share=st.floats(0.1, 1),
    depth=st.integers(0, 200_000), fewer=st.integers(0, 200_000),
)  # fmt: skip
def test_less_work_and_more_bandwidth_are_no_slower(
    data: st.DataObject, engine: str, mac: MachineSpec, share: float, depth: int, fewer: int
) -> None:
    """Fewer bytes of weights, less depth and more bandwidth each make nothing slower."""
    shape = data.draw(shapes(engine))
    plain = forecast(shape, mac, engine, depth_tokens=depth)
    bandwidth = int((mac.memory_bandwidth or 0) / share)
    faster = msgspec.structs.replace(mac, memory_bandwidth=bandwidth)
    assert is_no_slower(forecast(shape, faster, engine, depth_tokens=depth), plain)
    lighter = msgspec.structs.replace(
        shape, active_bytes=int(share * shape.active_bytes),
        weights_bytes=int(share * shape.weights_bytes),
    )  # fmt: skip
    assert is_no_slower(forecast(lighter, mac, engine, depth_tokens=depth), plain)
    shallow = forecast(shape, mac, engine, depth_tokens=min(depth, fewer))
    assert is_no_slower(shallow, plain)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), engine=ENGINES, mac=st.sampled_from(MACHINES), depth=st.integers(0, 100_000))
def test_fewer_bits_of_kv_are_no_slower(
    data: st.DataObject, engine: str, mac: MachineSpec, depth: int
) -> None:
    """The fewer bits a cached value has, the faster every chip decodes, or as fast."""
    shape = data.draw(shapes(engine))
    speeds = [
        forecast(shape, mac, engine, kv_type_k=kv, kv_type_v=kv, depth_tokens=depth)
        for kv in KV_TYPES
    ]
    assert all(is_no_slower(one, other) for one, other in itertools.pairwise(speeds))
