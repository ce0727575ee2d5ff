"""Forecasts for Macs by the constants that ship: their error, their limits, their direction."""

import itertools

import msgspec
import pytest
from support.apple_rows import sample_rows

from brim.cli.forecast import chip_of
from brim.core.forecast import SpeedForecast, SpeedShape
from brim.core.machine import MachineSpec
from brim.core.model import KvLayer
from brim.machine.chips import known_machines, named_machine
from brim.planner.apple.row_forecast import forecast_row, summarise
from brim.planner.apple.speed import apple_chip, fitted, forecast_apple, forecast_setting
from brim.planner.apple.terms import Setting, decode_terms, kv_bytes_read, prefill_terms

GB = 10**9
LLAMA_8B = SpeedShape(
    num_layers=32, hidden_size=4096, num_heads=32, num_kv_heads=8, key_dim=128, vocab_size=128256,
    active_bytes=int(4.62 * GB), weights_bytes=int(4.92 * GB), active_parameters=7_504_920_576,
    kv_layers=(KvLayer(key_width=1024, value_width=1024),) * 32, quant="Q4_K_M",
)  # fmt: skip
QWEN_30B_A3B = SpeedShape(
    num_layers=48, hidden_size=2048, num_heads=32, num_kv_heads=4, key_dim=128, vocab_size=151936,
    active_bytes=int(1.85 * GB), weights_bytes=int(18.6 * GB), active_parameters=3_030_000_000,
    kv_layers=(KvLayer(key_width=512, value_width=512),) * 48, quant="Q4_K_M",
    num_experts=128, num_active_experts=8,
)  # fmt: skip
WINDOWED_12B = SpeedShape(
    num_layers=48, hidden_size=3840, num_heads=16, num_kv_heads=8, key_dim=256, vocab_size=262208,
    active_bytes=int(7.3 * GB), weights_bytes=int(7.3 * GB), active_parameters=11_700_000_000,
    kv_layers=(KvLayer(key_width=2048, value_width=2048, window_tokens=1024),) * 40
    + (KvLayer(key_width=2048, value_width=2048),) * 8, quant="Q4_K_M",
)  # fmt: skip
SHAPES = (LLAMA_8B, QWEN_30B_A3B, WINDOWED_12B)


def forecast(
    shape: SpeedShape = LLAMA_8B,
    machine: str = "M4:10:16",
    *,
    engine: str = "llamacpp",
    kv_type: str = "q8_0",
    flash_attention: bool = True,
    depth_tokens: int = 0,
    prompt_tokens: int = 512,
    num_sequences: int = 1,
) -> SpeedForecast:
    found = forecast_apple(
        shape, named_machine(machine), engine=engine, kv_type_k=kv_type, kv_type_v=kv_type,
        flash_attention=flash_attention, depth_tokens=depth_tokens, prompt_tokens=prompt_tokens,
        num_sequences=num_sequences,
    )  # fmt: skip
    assert found is not None
    return found


def test_sampled_rows_are_forecast_as_stated() -> None:
    """On measured rows the constants that ship err no more than is promised of them."""
    found = [forecast_row(row, chip_of) for row in sample_rows()]
    decode, prefill = summarise(found)
    assert (decode.kind, decode.num_rows, prefill.num_rows) == ("decode", 36, 24)
    assert decode.median_error_percent <= 8
    assert prefill.median_error_percent <= 15
    assert min(decode.inside_percent, prefill.inside_percent) >= 90
    assert decode.median_high_over_low <= 1.6
    assert decode.num_above_ceiling == 0


def test_stated_figures_are_within_what_is_promised() -> None:
    """The figures that the fit wrote beside the constants keep the project's promises."""
    decode, prefill = fitted().figures["decode"], fitted().figures["prefill"]
    assert decode["fit_median_percent"] <= decode["rows_median_percent"] <= 8
    assert decode["models_median_percent"] <= 13
    assert decode["rows_coverage_percent"] >= 90
    assert decode["median_high_over_low"] <= 1.6
    assert prefill["rows_median_percent"] <= 15
    assert {"rows_sha256", "sources", "written_by"} <= set(fitted().provenance)


def test_8b_on_a_16_gb_m4() -> None:
    """An 8 B Q4_K_M model with q8_0 KV decodes between 18 and 24 tok/s on a base M4."""
    assert 18 <= forecast().decode_tok_s.expected <= 24


def test_nothing_is_faster_than_its_bytes() -> None:
    """On every known machine even `high` stays below bandwidth over bytes."""
    machines = {(m.chip, m.gpu_cores): m for m in known_machines()}.values()
    for machine, shape, depth in itertools.product(machines, SHAPES, (0, 30_000)):
        setting = Setting(engine="llama.cpp", flash_attention=True)
        found = forecast_setting(shape, machine, setting, depth_tokens=depth, prompt_tokens=512)
        assert found is not None
        assert machine.memory_bandwidth is not None
        num_bytes = shape.active_bytes + kv_bytes_read(shape, setting, depth)
        speed = found.decode_tok_s
        assert 0 < speed.low <= speed.expected <= speed.high < machine.memory_bandwidth / num_bytes
        assert found.decode_ceiling_tok_s == pytest.approx(machine.memory_bandwidth / num_bytes)
        assert 0 < found.prefill_tok_s.low < found.prefill_tok_s.expected


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("engine", ["llamacpp", "mlx"])
def test_depth_slows_decode(shape: SpeedShape, engine: str) -> None:
    """The more tokens are cached, the slower each further token is."""
    speeds = [
        forecast(shape, "M3 Max:40:128", engine=engine, depth_tokens=depth).decode_tok_s.expected
        for depth in (0, 512, 1024, 4096, 16_384, 131_072)
    ]
    assert speeds == sorted(set(speeds), reverse=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_company_slows_each_sequence(shape: SpeedShape) -> None:
    """More sequences at once make each slower, and all together no slower than one alone."""
    counts = (1, 2, 4, 8, 16)
    speeds = [
        forecast(shape, "M4 Max:40:128", depth_tokens=2048, num_sequences=num).decode_tok_s.expected
        for num in counts
    ]
    assert speeds == sorted(set(speeds), reverse=True)
    assert all(num * speed > speeds[0] for num, speed in list(zip(counts, speeds, strict=True))[1:])


def test_more_kv_bits_cost_more() -> None:
    """At depth f16 KV is slower than q8_0, and q8_0 slower than q4_0."""
    speeds = [
        forecast(kv_type=kv_type, depth_tokens=8192).decode_tok_s.expected
        for kv_type in ("f16", "q8_0", "q4_0")
    ]
    assert speeds == sorted(set(speeds))


def test_windows_bound_what_depth_costs() -> None:
    """A layer that looks back 1,024 tokens reads no more KV at 100,000."""
    sliding = msgspec.structs.replace(WINDOWED_12B, kv_layers=WINDOWED_12B.kv_layers[:40])
    near, far = (forecast(sliding, depth_tokens=depth) for depth in (1024, 100_000))
    assert near.decode_tok_s.expected == far.decode_tok_s.expected


def test_unfused_attention_is_slower() -> None:
    """Without flash attention decode at depth is slower."""
    fused = forecast(depth_tokens=8192, kv_type="f16")
    unfused = forecast(depth_tokens=8192, kv_type="f16", flash_attention=False)
    assert unfused.decode_tok_s.expected < fused.decode_tok_s.expected


@pytest.mark.parametrize("machine", ["M6:12:16", "A18 Pro:5:8", "M5 Ultra:80:512", "M4:8:16"])
def test_chips_that_nobody_measured_fall_back(machine: str) -> None:
    """A chip without rows is forecast from its family, with a wider range and the reason."""
    found, seen = forecast(machine=machine), forecast(machine="M4 Pro:20:48")
    known = seen.decode_tok_s.high / seen.decode_tok_s.low
    assert "rows" not in found.reasons["range"]
    assert "rows of this chip" in seen.reasons["range"]
    ceiling = found.decode_ceiling_tok_s
    assert ceiling is not None
    assert 0.45 * ceiling < found.decode_tok_s.expected < 0.95 * ceiling
    # Where the ceiling cuts the range off, the lower half still shows its width.
    assert (found.decode_tok_s.expected / found.decode_tok_s.low) ** 2 > known


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        ("M4 Pro:20:48", "14 measured rows of this chip with llama.cpp"),
        ("M4 Pro:16:24", "another bin of this chip was measured with llama.cpp, not this one"),
        ("M4:10:16", "this chip was measured with other engines than llama.cpp"),
        ("M6:12:16", "nobody's M6 is among the measurements: its generation and tier are used"),
    ],
)
def test_a_range_says_what_it_rests_on(machine: str, reason: str) -> None:
    """Rows of the bin, of another bin, of another engine, or none: each in its own words."""
    assert forecast(machine=machine).reasons["range"] == reason


def test_other_machines_have_no_forecast() -> None:
    """A machine without an Apple chip is not forecast from Apple's."""
    linux = MachineSpec(name="pc", system="linux", ram_bytes=2**35, others_bytes=0, chip="i9")
    assert apple_chip(linux) is None
    assert apple_chip(msgspec.structs.replace(named_machine("M4"), memory_bandwidth=None)) is None


def test_a_short_prompt_of_experts_is_read_slower() -> None:
    """A mixture of experts reads 128 tokens at a lower rate than 2,048."""
    short, long = (
        forecast(QWEN_30B_A3B, "M5 Max:40:128", prompt_tokens=tokens).prefill_tok_s.expected
        for tokens in (128, 2048)
    )
    assert short < 0.8 * long


def test_no_term_counts_an_effect_twice() -> None:
    """On no chip do two levels of pooling share a name, which would count a constant twice."""
    for machine in known_machines():
        chip = apple_chip(machine)
        assert chip is not None
        for shape, engine in itertools.product(SHAPES, ("llama.cpp", "mlx-lm")):
            setting = Setting(engine=engine, flash_attention=True)
            terms = decode_terms(shape, chip, setting, 1000) + prefill_terms(
                shape, chip, setting, 512
            )
            for term in terms:
                assert term.seconds >= 0
                assert len(term.effects) == len(set(term.effects))
