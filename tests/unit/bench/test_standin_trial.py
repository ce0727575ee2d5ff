"""What is built, what is scaled, and what is removed again; the machine is played."""

import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace

import msgspec
import psutil
import pytest
from support.standin_machine import (
    FIXED_S,
    LAYER_S,
    MACHINE,
    MODEL,
    Machine,
    granted_at_once,
    plan_of,
    row,
)

from brim.bench.standin import tiny
from brim.bench.standin.checkpoint import CheckpointModel
from brim.bench.standin.child import Found, Job
from brim.bench.standin.trial import Seconds, Trial, Wanted, try_model
from brim.core.model import ModelSpec
from brim.core.plan import Plan
from brim.errors import DoesNotFit, EngineError, InvalidRequest
from brim.planner.plan import make_plan


def tried(tmp_path: Path, machine: Machine, **wanted: int) -> Trial:
    return try_model(
        MODEL, Wanted(**wanted), plan_of, granted_at_once, name="m", directory=tmp_path,
        run=machine.run,
    )  # fmt: skip


def test_a_small_model_is_measured_whole(tmp_path: Path) -> None:
    """Nothing is scaled, and nothing is left on the disk."""
    machine = Machine()
    trial = tried(tmp_path, machine)
    assert machine.layers == [16]
    assert (trial.slices, trial.scaled) == ((), {})
    assert trial.whole.decode_s.median == pytest.approx(FIXED_S + 16 * LAYER_S)
    assert trial.whole.weights_bytes == MODEL.weights_bytes == trial.spec.weights_bytes
    assert list(tmp_path.iterdir()) == []


def test_two_slices_scale_to_the_whole(tmp_path: Path) -> None:
    """Time and memory are those of a machine with a fixed cost and one for each layer."""
    machine = Machine()
    trial = tried(tmp_path, machine, layers=8, num_prompt=64)
    assert machine.layers == [2, 8]
    assert [each.num_layers for each in trial.slices] == [2, 8]
    whole = trial.whole
    assert whole.decode_s.median == pytest.approx(FIXED_S + 16 * LAYER_S)
    assert whole.prefill_s.median == pytest.approx(64 * (FIXED_S + 16 * LAYER_S) / 4)
    assert (whole.dirty_bytes, whole.file_bytes) == (41_600, 7_000 + MODEL.weights_bytes)
    assert (whole.footprint.kv_bytes, whole.footprint.compute_bytes) == (1024, 999)
    assert whole.load_s == pytest.approx(17.0)
    assert whole.weights_bytes == MODEL.weights_bytes
    assert "2 and 8 layers, continued to 16" in trial.scaled["decode"]
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_sliced_as_a_file_is(tmp_path: Path) -> None:
    """Directories are built, measured by the MLX engine's plan and removed again."""
    jobs: list[Job] = []
    machine = Machine()

    def run(job: Job) -> Found:
        jobs.append(job)
        (place,) = (Path(path).parent for path in job.plan.model.paths)
        assert list(place.parent.iterdir()) == [place]  # the slice before it is gone
        return machine.run(job)

    def plan(spec: ModelSpec) -> Plan:
        return make_plan(spec, MACHINE, engine="mlx", context_tokens=256)

    model = CheckpointModel(tiny("qwen3", num_layers=16), "MLX 4bit")
    trial = try_model(
        model, Wanted(layers=8), plan, granted_at_once, name="m", directory=tmp_path, run=run
    )
    assert machine.layers == [2, 8]
    assert {job.plan.engine for job in jobs} == {"mlx"}
    assert {path.name for path in machine.files} == {"model.safetensors"}
    assert trial.whole.weights_bytes == model.checkpoint().weights_bytes
    assert trial.whole.decode_s.median == pytest.approx(FIXED_S + 16 * LAYER_S)
    assert list(tmp_path.iterdir()) == []


def test_a_large_checkpoint_is_sliced_by_itself(tmp_path: Path) -> None:
    """As many layers as the limit holds."""
    machine = Machine()
    model = CheckpointModel(tiny("llama", num_layers=16), "MLX bf16")
    most = model.checkpoint().weights_bytes // 2
    try_model(
        model, Wanted(max_bytes=most), plan_of, granted_at_once, name="m", directory=tmp_path,
        run=machine.run,
    )  # fmt: skip
    assert len(machine.layers) == 2
    assert 1 < machine.layers[1] < 9


def test_the_range_of_a_scaled_time_is_wider_than_that_of_its_slices(tmp_path: Path) -> None:
    """Noise grows with the distance that a line is continued."""
    trial = tried(tmp_path, Machine(), layers=8)
    whole, deep = trial.whole.decode_s, trial.slices[1].decode_s
    assert whole.quickest < whole.median < whole.slowest
    assert whole.slowest / whole.quickest > deep.slowest / deep.quickest
    # The steepest and the flattest line through the slices' ranges, 2 and 8 of 16 layers.
    low, high = 0.014 * 1.1, 0.026 / 1.1
    assert whole.quickest == pytest.approx(low + (high - low) * 14 / 6)


def test_slices_are_loaded_as_the_whole_would_be(tmp_path: Path) -> None:
    """A short model might get other options of its own: fewer threads, another KV type."""
    jobs: list[Job] = []
    machine = Machine()

    def run(job: Job) -> Found:
        jobs.append(job)
        return machine.run(job)

    trial = try_model(
        MODEL, Wanted(layers=8), plan_of, granted_at_once, name="m", directory=tmp_path, run=run
    )
    for job in jobs:
        assert job.plan.memory.kv_bytes < trial.plan.memory.kv_bytes
        unlike = {"model": trial.plan.model, "memory": trial.plan.memory}
        assert msgspec.structs.replace(job.plan, **unlike) == trial.plan


def test_a_model_that_is_too_large_is_sliced_by_itself(tmp_path: Path) -> None:
    """As many layers as the limit holds."""
    machine = Machine()
    tried(tmp_path, machine, max_bytes=MODEL.weights_bytes // 2)
    assert len(machine.layers) == 2
    assert 1 < machine.layers[1] < 9


def test_what_may_not_be_loaded_is_not_built(tmp_path: Path) -> None:
    """The account is asked before a byte of weights is written."""
    machine = Machine()

    def refuse(plan: Plan) -> AbstractContextManager[None]:
        raise DoesNotFit("no room")

    with pytest.raises(DoesNotFit):
        try_model(MODEL, Wanted(), plan_of, refuse, name="m", directory=tmp_path, run=machine.run)
    assert machine.layers == []
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message has the sizes and the ways out."""
    usage = SimpleNamespace(free=10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DoesNotFit, match=r"has 1.0 GB; free 1.2 GB, or give fewer --layers"):
        tried(tmp_path, Machine())
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gigabytes of a dead process do not stay; those of a living one do."""
    for pid in (111, 222):
        (tmp_path / f"standin-{pid}-x").mkdir()
        (tmp_path / f"standin-{pid}-x" / "8-layers.gguf").write_bytes(b"x")
    monkeypatch.setattr(psutil, "pid_exists", lambda pid: pid == 222)
    tried(tmp_path, Machine())
    assert [each.name for each in tmp_path.iterdir()] == ["standin-222-x"]


def test_files_are_removed_when_measuring_fails(tmp_path: Path) -> None:
    """A crash of the child leaves no gigabytes behind."""

    def crash(job: Job) -> Found:
        raise EngineError("crashed")

    with pytest.raises(EngineError, match="crashed"):
        try_model(
            MODEL, Wanted(), plan_of, granted_at_once, name="m", directory=tmp_path, run=crash
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("layers", "message"), [(1, "give --layers 2 or more"), (17, "choose 1 to 16, not 17")]
)
def test_layers_that_say_nothing_are_refused(tmp_path: Path, layers: int, message: str) -> None:
    """Two depths are needed, and no more layers than there are."""
    with pytest.raises(InvalidRequest, match=message):
        tried(tmp_path, Machine(), layers=layers)


def test_noise_that_hides_the_layers_is_refused(tmp_path: Path) -> None:
    """A line through two equal times would say that layers are free."""

    class Noisy(Machine):
        def run(self, job: Job) -> Found:
            found = super().run(job)
            return msgspec.structs.replace(found, rows=self.first)

        first = (row("pp", 1.0, 512), row("tg", 1.0, 32))

    with pytest.raises(InvalidRequest, match="8 layers took no longer than 2"):
        tried(tmp_path, Noisy(), layers=8)


def test_seconds_are_ordered() -> None:
    """Quickest, median, slowest."""
    assert Seconds(1.0, 2.0, 3.0).median == 2.0
