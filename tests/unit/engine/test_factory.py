"""Engines by name: what is known, what is installed, and what is said of what is not."""

import builtins
import subprocess
import sys
from typing import Any

import pytest
from support.models import plan_for

from brim.engine import factory
from brim.engine.llamacpp import dry_run
from brim.errors import ConfigError


def test_an_unknown_name_lists_the_known_ones() -> None:
    """A name that no engine has is refused with all that there are."""
    with pytest.raises(ConfigError, match="no engine named 'vllm'; choose one of llamacpp, mlx"):
        factory.create("vllm")


def test_every_engine_says_what_it_cannot_do_without() -> None:
    """The table of backends is complete, and the toy engine needs none."""
    assert factory.BACKENDS.keys() == set(factory.ENGINES)
    assert "toy" in factory.available_engines()


def test_looking_for_engines_imports_none() -> None:
    """A gateway may ask what is installed without a backend's libraries in its memory."""
    code = (
        "import sys; from brim.engine import factory; factory.available_engines(); "
        "print({'mlx', 'mlx_lm', 'llama_cpp', 'tokenizers', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("system", "processor", "name", "says"),
    [
        ("linux", "x86_64", "mlx", r"pip install 'brim\[mlx\]'"),
        ("darwin", "arm64", "mlx", r"pip install 'brim\[mlx\]'"),
        ("darwin", "x86_64", "mlx", "MLX needs Apple silicon: take the model as GGUF"),
        ("linux", "x86_64", "llamacpp", "pip install llama-cpp-python"),
    ],
)
def test_a_missing_engine_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, system: str, processor: str, name: str, says: str
) -> None:
    """On each platform the sentence names what can be installed there."""
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr("platform.machine", lambda: processor)
    monkeypatch.setattr(factory, "available_engines", frozenset[str])
    hide(monkeypatch)
    with pytest.raises(ConfigError, match=f"the {name} engine is not installed here; .*{says}"):
        factory.create(name)


def test_a_backend_that_does_not_start_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that is there and cannot be loaded is told apart from one that is not there."""
    monkeypatch.setattr(factory, "available_engines", lambda: frozenset({"mlx"}))
    hide(monkeypatch)
    with pytest.raises(ConfigError, match=r"the mlx engine cannot be used \(libmlx\.so is gone\)"):
        factory.create("mlx")


def test_a_plan_is_not_checked_with_a_backend_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A plan for an engine that is still to be installed has no defect on that account."""
    plan = plan_for("llamacpp")
    monkeypatch.setattr(dry_run, "dry_run", None)  # calling it would fail
    monkeypatch.setattr(factory, "available_engines", frozenset[str])
    assert factory.defects_of_plan(plan) == []


def hide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every import of a concrete engine fail."""
    whole = builtins.__import__

    def failing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith(("brim.engine.mlx", "brim.engine.llamacpp")):
            raise ImportError("libmlx.so is gone")
        return whole(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", failing)
