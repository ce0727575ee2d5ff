"""What a worker inherits, and how its end is put in words."""

import msgspec
import pytest
from support.models import plan_for

from brim.runtime.worker_limits import hang_limit_s, load_limit_s
from brim.runtime.worker_start import exit_in_words, worker_environment


def test_a_worker_inherits_what_a_process_needs_and_nothing_that_tunes_threads() -> None:
    """The plan has measured its settings; a shell's leftovers must not change them."""
    plan = msgspec.structs.replace(plan_for("toy"), environment={"OMP_WAIT_POLICY": "passive"})
    inherited = {
        "PATH": "/bin", "LC_ALL": "C", "PYTHONPATH": "x", "OMP_NUM_THREADS": "64",
        "GGML_CPU_TILED_MM": "0", "OMP_WAIT_POLICY": "active", "HF_TOKEN": "secret",
        "MLX_MAX_OPS_PER_BUFFER": "2000", "MLX_BFS_MAX_WIDTH": "1",
    }  # fmt: skip
    assert worker_environment(plan, inherited) == {
        "PATH": "/bin",
        "LC_ALL": "C",
        "PYTHONPATH": "x",
        "OMP_WAIT_POLICY": "passive",
        "GGML_NO_BACKTRACE": "1",
    }


@pytest.mark.parametrize(
    ("num_parameters", "weights_bytes", "num_rows", "limit_s"),
    [(0, 0, 512, 60), (10**9, 10**9, 512, 60 + 51.2 + 20), (7 * 10**10, 0, 1, 60 + 7)],
)
def test_a_worker_may_be_silent_for_as_long_as_its_slowest_step(
    num_parameters: int, weights_bytes: int, num_rows: int, limit_s: float
) -> None:
    """Rows times weights at a slow core's rate, and the weights from a slow disk, after 60 s."""
    plan = plan_for("toy", max_batch_tokens=num_rows)
    model = msgspec.structs.replace(
        plan.model, num_parameters=num_parameters, weights_bytes=weights_bytes
    )
    assert hang_limit_s(msgspec.structs.replace(plan, model=model)) == pytest.approx(limit_s)


@pytest.mark.parametrize(("system", "limit_s"), [("linux", 60 + 5e4), ("darwin", 60 + 50)])
def test_mlx_without_a_gpu_may_be_silent_for_longer(
    monkeypatch: pytest.MonkeyPatch, system: str, limit_s: float
) -> None:
    """A chunk of a packed model takes MLX minutes on a CPU, which is no hanging."""
    monkeypatch.setattr("brim.runtime.worker_limits.sys.platform", system)
    plan = plan_for("toy", max_batch_tokens=500)
    model = msgspec.structs.replace(plan.model, num_parameters=10**9, weights_bytes=0)
    plan = msgspec.structs.replace(plan, model=model, engine="mlx")
    assert hang_limit_s(plan) == pytest.approx(limit_s)


@pytest.mark.parametrize(("engine", "limit_s"), [("mlx", 60 + 20 + 4e3), ("llamacpp", 60 + 20 + 4)])
def test_a_worker_may_try_out_what_it_has_loaded(
    monkeypatch: pytest.MonkeyPatch, engine: str, limit_s: float
) -> None:
    """A billion packed weights times a few tokens take MLX's CPU kernels an hour at worst."""
    monkeypatch.setattr("brim.runtime.worker_limits.sys.platform", "linux")
    plan = plan_for("toy")
    model = msgspec.structs.replace(plan.model, num_parameters=10**9, weights_bytes=10**9)
    plan = msgspec.structs.replace(plan, model=model, engine=engine)
    assert load_limit_s(plan) == pytest.approx(limit_s)


@pytest.mark.parametrize(
    ("exit_code", "words"),
    [
        (3, "exited with code 3"),
        (-9, "was killed by signal 9 (SIGKILL), as the system does when memory runs out"),
        (-11, "was killed by signal 11 (SIGSEGV)"),
        (-63, "was killed by signal 63"),
        (None, "closed its connection and was killed"),
    ],
)
def test_an_exit_code_is_put_in_words(exit_code: int | None, words: str) -> None:
    """Clients and operators read words, and the number is still there."""
    assert exit_in_words(exit_code) == words
