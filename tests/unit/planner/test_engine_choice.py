"""Which engine a model in several forms is given to, and why."""

from typing import Any

import msgspec
import pytest

from brim.core.machine import MachineSpec
from brim.core.model import ModelSpec
from brim.errors import ConfigError
from brim.machine.chips import named_machine
from brim.planner.engine_choice import FASTER, choose_engine
from brim.planner.fit import Room
from brim.planner.forecast import forecast_plan
from brim.planner.plan import make_plan

GIB = 2**30
BOTH = frozenset({"llamacpp", "mlx"})


def forms_of(spec: ModelSpec, **mlx: Any) -> dict[str, ModelSpec]:
    """The model as GGUF and in MLX's packing, which is a little smaller."""
    packed = {
        "format": "safetensors", "quant": "MLX 4bit", "weights_bytes": 700_000_000,
        "active_bytes": 700_000_000, "matrix_bytes": {"MLX 4bit": 700_000_000},
    }  # fmt: skip
    return {"llamacpp": spec, "mlx": msgspec.structs.replace(spec, **(packed | mlx))}


def test_the_platform_decides_where_nothing_else_does(
    llama_1b: ModelSpec, mac: MachineSpec, laptop: MachineSpec
) -> None:
    """MLX on Apple silicon, llama.cpp where there is no Apple GPU, each with that reason."""
    forms = forms_of(llama_1b)
    on_mac = choose_engine(forms, mac, available=BOTH)
    on_linux = choose_engine(forms, laptop, available=BOTH)
    assert (on_mac.engine, on_mac.reason) == ("mlx", "MLX is the default on Apple silicon")
    assert on_linux.engine == "llamacpp"
    assert on_linux.reason == "llama.cpp is the default where there is no Apple GPU"


def test_an_engine_or_form_that_is_missing_decides(llama_1b: ModelSpec, mac: MachineSpec) -> None:
    """What is not installed or not at hand leaves the other, and the reason says which it was."""
    forms = forms_of(llama_1b)
    without = choose_engine(forms, mac, available=frozenset({"llamacpp", "toy"}))
    assert without.engine == "llamacpp"
    assert "MLX, which would load another form of the model, is not installed" in without.reason
    alone = choose_engine({"llamacpp": llama_1b}, mac, available=BOTH)
    assert alone.engine == "llamacpp"
    assert alone.reason == "the model is at hand in a form that only llama.cpp loads"


def test_nothing_usable_is_an_error(llama_1b: ModelSpec, mac: MachineSpec) -> None:
    """A model in a form for which no engine is here is refused with what it needs."""
    with pytest.raises(ConfigError, match="needs MLX, which is not installed here; install it"):
        choose_engine({"mlx": llama_1b}, mac, available=frozenset({"llamacpp"}))
    with pytest.raises(ConfigError, match="in no form that an engine loads"):
        choose_engine({}, mac, available=BOTH)


def test_a_form_that_fits_takes_the_place_of_one_that_does_not(
    llama_1b: ModelSpec, mac: MachineSpec
) -> None:
    """Where the default's form is too large for the room and the other's is not, that is taken."""
    forms = forms_of(llama_1b, weights_bytes=9 * GIB)
    choice = choose_engine(forms, mac, available=BOTH, room=Room(6 * GIB, 8 * GIB))
    assert choice.engine == "llamacpp"
    assert choice.reason.startswith("Q4_K_M in llama.cpp fits with")
    assert "MLX 4bit in MLX needs" in choice.reason
    comfort = choose_engine(forms, mac, available=BOTH, room=Room(6 * GIB, 12 * GIB))
    assert "fits in comfort" in comfort.reason
    neither = choose_engine(forms, mac, available=BOTH, room=Room(GIB // 8, GIB // 8))
    assert neither.engine == "mlx"


def test_a_wish_that_the_default_cannot_meet_decides(llama_1b: ModelSpec, mac: MachineSpec) -> None:
    """Two KV types are llama.cpp's alone, and the reason quotes why MLX cannot have them."""
    choice = choose_engine(forms_of(llama_1b), mac, available=BOTH, kv_type="q8_0/f16")
    assert choice.engine == "llamacpp"
    assert "MLX cannot have it as asked: MLX stores K and V in one type" in choice.reason


def test_a_large_difference_in_speed_decides(llama_1b: ModelSpec) -> None:
    """A form forecast 1.3 times as fast at no worse quality is taken, and no other."""
    machine = named_machine("M4:10:16")
    slow = forms_of(llama_1b, weights_bytes=2 * GIB, active_bytes=2 * GIB)
    equal = {"llamacpp": 2.8, "mlx": 2.8}
    choice = choose_engine(slow, machine, available=BOTH, perplexity_increase_percent=equal)
    assert choice.engine == "llamacpp"
    assert "times as fast as MLX here, at no worse quality" in choice.reason
    worse = equal | {"llamacpp": 5.0}
    for costs in (worse, {"mlx": 2.8}, None):
        kept = choose_engine(slow, machine, available=BOTH, perplexity_increase_percent=costs)
        assert kept.engine == "mlx"


def test_a_small_difference_in_speed_decides_nothing(llama_1b: ModelSpec) -> None:
    """A form forecast a few percent faster leaves the default: no forecast is that good."""
    machine = named_machine("M4:10:16")
    near = forms_of(llama_1b, weights_bytes=880_000_000, active_bytes=880_000_000)
    tok_s = {}
    for name, spec in near.items():
        speed = forecast_plan(make_plan(spec, machine, engine=name), machine).speed
        assert speed is not None
        tok_s[name] = speed.decode_tok_s.expected
    assert 1.0 < tok_s["llamacpp"] / tok_s["mlx"] < FASTER
    equal = {"llamacpp": 2.8, "mlx": 2.8}
    choice = choose_engine(near, machine, available=BOTH, perplexity_increase_percent=equal)
    assert choice.engine == "mlx"
