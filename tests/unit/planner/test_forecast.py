"""Which source a forecast of speed is made from, and where it says nothing."""

import pytest

from brim.core.forecast import Forecast
from brim.core.machine import MachineSpec
from brim.core.model import ModelSpec
from brim.machine.chips import named_machine
from brim.planner.forecast import forecast_plan
from brim.planner.plan import make_plan
from brim.planner.recommend import Use, band_speed

PROBED = 40_000_000_000


def forecast_of(spec: ModelSpec, machine: MachineSpec, engine: str) -> Forecast:
    plan = make_plan(spec, machine, engine=engine)
    return forecast_plan(plan, machine, read_bytes_per_s=PROBED)


def test_mlx_on_a_processor_is_not_forecast(llama_1b: ModelSpec, laptop: MachineSpec) -> None:
    """Bandwidth says nothing of MLX without a GPU: no figure, and what to do instead."""
    silent = forecast_of(llama_1b, laptop, "mlx")
    assert (silent.speed, silent.full_decode_tok_s, silent.first_token_s) == (None, None, None)
    assert "measure it: brim bench speed" in silent.reasons["speed"]
    assert band_speed(silent, Use.CHAT) is None


def test_a_probe_forecasts_llama_cpp_and_mlx_on_a_gpu(
    llama_1b: ModelSpec, laptop: MachineSpec, mac: MachineSpec
) -> None:
    """Where nothing better is known, the probe's bandwidth gives a wide range that names it."""
    for machine, engine in ((laptop, "llamacpp"), (mac, "mlx")):
        speed = forecast_of(llama_1b, machine, engine).speed
        assert speed is not None
        assert speed.source == "a probe of memory bandwidth (40 GB/s)"
        assert speed.decode_tok_s.high > 3 * speed.decode_tok_s.low


def test_measured_macs_come_before_a_probe(llama_1b: ModelSpec) -> None:
    """A chip of the table is forecast from it, whatever the probe of this machine says."""
    speed = forecast_of(llama_1b, named_machine("M4:10:16"), "mlx").speed
    assert speed is not None
    assert "probe" not in speed.source


@pytest.mark.parametrize(("engine", "why"), [("llamacpp", "run: brim calibrate"), ("toy", "toy")])
def test_an_unknown_speed_says_why(
    llama_1b: ModelSpec, laptop: MachineSpec, engine: str, why: str
) -> None:
    """Without a calibration, a table or a probe there is no figure, but a reason."""
    forecast = forecast_plan(make_plan(llama_1b, laptop, engine=engine), laptop)
    assert forecast.speed is None
    assert why in forecast.reasons["speed"]
