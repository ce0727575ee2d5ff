"""The command line of `brim bench`."""

from pathlib import Path

import msgspec
import pytest
from support.models import PYSTD_1M, plan_for
from typer.testing import CliRunner

from brim.cli import bench
from brim.cli.bench_engines import specs_of, together
from brim.core.memory import MemoryTerms
from brim.engine import factory
from brim.errors import ConfigError

RUNNER = CliRunner()


@pytest.mark.parametrize("text", ["", "x", "1,,2", "-1", "1;2"])
def test_lists_of_numbers_that_are_none_are_refused(text: str) -> None:
    """The message names the option and shows the form."""
    result = RUNNER.invoke(bench.app, ["speed", "-m", "demo", "--depth", text])
    assert result.exit_code == 2
    assert "--depth takes numbers from 0 up" in " ".join(result.output.split())


def test_a_batch_of_zero_is_refused() -> None:
    """Nothing would be produced."""
    result = RUNNER.invoke(bench.app, ["speed", "-m", "demo", "--batch", "1,0"])
    assert result.exit_code == 2
    assert "--batch takes numbers from 1 up" in " ".join(result.output.split())


def test_both_engines_need_a_form_for_each() -> None:
    """A GGUF file has none for MLX, and the message says how to name one."""
    result = RUNNER.invoke(bench.app, ["speed", "-m", "demo", "--engine", "both"])
    assert isinstance(result.exception, ConfigError)
    assert "no form for mlx; name its safetensors form by another -m" in str(result.exception)


@pytest.mark.parametrize("engine", ["mlx", "nonsense"])
def test_one_engine_for_several_models_is_refused(engine: str) -> None:
    """The word is not ignored, whether an engine has that name or not."""
    command = ["speed", "-m", "demo", "-m", str(PYSTD_1M), "--engine", engine]
    result = RUNNER.invoke(bench.app, command)
    assert isinstance(result.exception, ConfigError)
    assert f"leave --engine {engine} out, or name one model" in str(result.exception)


def test_nothing_is_converted_for_an_engine_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The sentence comes before minutes of work, not after them."""
    monkeypatch.setattr(factory, "available_engines", lambda: frozenset({"llamacpp"}))
    said: list[str] = []
    with (
        pytest.raises(ConfigError, match="the mlx engine is not installed"),
        specs_of([str(PYSTD_1M)], said.append),
    ):
        pass
    assert not said


def test_two_models_of_one_engine_are_refused() -> None:
    """A ratio needs two engines."""
    result = RUNNER.invoke(bench.app, ["speed", "-m", "demo", "-m", "demo"])
    assert isinstance(result.exception, ConfigError)
    assert "two of the models are for llamacpp" in str(result.exception)


def test_a_checkpoint_is_converted_for_the_other_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its GGUF form exists as long as it is used, and nothing of it stays on the disk."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with specs_of([str(PYSTD_1M)], lambda _: None) as (checkpoint, converted):
        assert (checkpoint.format, converted.format) == ("safetensors", "gguf")
        assert checkpoint.num_parameters == converted.num_parameters
        path = Path(converted.paths[0])
        assert path.is_file()
        assert path.is_relative_to(tmp_path)
    assert not path.exists()


def test_memory_of_engines_side_by_side_adds_up() -> None:
    """One grant covers both processes."""
    plan = plan_for("toy")
    terms = MemoryTerms(weights_bytes=1, kv_bytes=2, compute_bytes=3, overhead_bytes=4)
    plan = msgspec.structs.replace(plan, memory=terms)
    assert together([plan, plan]).total_bytes == 2 * terms.total_bytes


def test_an_unknown_objective_is_refused_with_the_choices() -> None:
    """A misspelt word is bad usage and not a traceback."""
    result = RUNNER.invoke(bench.app, ["speed", "-m", "demo", "--objective", "speed"])
    assert result.exit_code == 2
    assert "decode, prefill, memory" in " ".join(result.output.split())
