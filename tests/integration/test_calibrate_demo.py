"""Calibrating with the real engine in real child processes, on the model that comes with brim."""

from pathlib import Path

import msgspec
import pytest
from conftest import require_engine
from support.models import DEMO

from brim.bench.calibrate.child import Order
from brim.bench.calibrate.process import MeasuringProcess
from brim.bench.calibrate.run import Subject, calibrate, plan_of
from brim.bench.calibrate.suite import Job, base_setting
from brim.core.calibration import Calibration
from brim.core.machine import Conditions, MachineSpec
from brim.errors import EngineError, ModelFileError
from brim.machine.bandwidth import read_bandwidth
from brim.planner.calibrated_speed import forecast_calibrated, load_s
from brim.planner.shape import speed_shape
from brim.registry.describe import describe_gguf

MACHINE = MachineSpec(
    name="here", system="linux", ram_bytes=16 * 2**30, others_bytes=0, performance_cores=2
)


@pytest.fixture(scope="module", autouse=True)
def _needs_llamacpp() -> None:
    require_engine("llamacpp")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    """One short round: two settings, a kept KV and two processes."""
    base = base_setting(MACHINE)
    passive = msgspec.structs.replace(base, wait_policy="passive")
    seen: list[float] = []
    found = calibrate(
        Subject(machine=MACHINE, engine="llamacpp", engine_version="x", conditions=Conditions()),
        tmp_path_factory.mktemp("calibrate"),
        bandwidth=read_bandwidth((1,), limit_s=0.01, buffer_bytes=2**22),
        rounds=1,
        paths={"demo": DEMO},
        jobs=[
            Job(model="demo", setting=base, prompts=(16, 64), depths=(0, 128), num_generate=3,
                kept_kv="demo", fills=True),
            Job(model="demo", setting=passive, prompts=(64,), depths=(0, 128), num_generate=3,
                kept_kv="demo"),
        ],
        progress=lambda share, _: seen.append(share),
    )  # fmt: skip
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    return found


def test_every_job_left_its_samples(measured: Calibration) -> None:
    """Prompts, filling and decode of the first, decode on the imported KV of the second."""
    found = {
        (sample.setting.wait_policy, sample.num_prompt, sample.depth) for sample in measured.samples
    }
    assert found == {
        ("spin3000", 16, 0), ("spin3000", 64, 0), ("spin3000", 128, 0), ("spin3000", 0, 0),
        ("spin3000", 0, 128), ("passive", 64, 0), ("passive", 0, 0), ("passive", 0, 128),
    }  # fmt: skip
    assert all(seconds > 0 for sample in measured.samples for seconds in sample.samples_s)
    assert len(measured.load_samples) == 2


def test_a_forecast_follows_from_it(measured: Calibration) -> None:
    """The demo's own speed is forecast from what was just measured of it, load time included."""
    spec = describe_gguf(DEMO)
    found = forecast_calibrated(
        speed_shape(spec), measured, engine="llamacpp", kv_type_k="f16", kv_type_v="f16",
        flash_attention=True, repack_weights=False, num_threads=2, num_batch_threads=2,
        depth_tokens=64, prompt_tokens=64,
    )  # fmt: skip
    for rate in (found.decode_tok_s, found.prefill_tok_s):
        assert 0 < rate.low <= rate.expected <= rate.high
    assert load_s(spec, measured, repack_weights=False) > 0


def test_it_survives_being_stored(measured: Calibration) -> None:
    """JSON holds every figure of a real calibration."""
    assert msgspec.json.decode(msgspec.json.encode(measured), type=Calibration) == measured


def test_a_file_that_cannot_be_loaded_is_the_engines_error(tmp_path: Path) -> None:
    """The error crosses the pipe as itself, and the process goes on."""
    spec = describe_gguf(DEMO)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(DEMO.read_bytes()[:100_000])
    plan = plan_of("llamacpp", spec, base_setting(MACHINE), 256)
    bad_model = msgspec.structs.replace(spec, paths=(str(broken),))
    bad = msgspec.structs.replace(plan, model=bad_model)
    with MeasuringProcess(plan) as process:
        with pytest.raises(ModelFileError, match=r"broken\.gguf"):
            process.run(Order(plan=bad, prompts=(8,)))
        assert process.run(Order(plan=plan, prompts=(8,))).prefill[0].num_prompt == 8


def test_a_process_that_dies_is_an_error_with_its_end_in_words() -> None:
    """Whoever waits for its answer learns that none will come, and of what it died."""
    plan = plan_of("llamacpp", describe_gguf(DEMO), base_setting(MACHINE), 256)
    with MeasuringProcess(plan) as process:
        process.run(Order(plan=plan))
        process.kill()
        with pytest.raises(EngineError, match="SIGKILL"):
            process.run(Order(plan=plan))
