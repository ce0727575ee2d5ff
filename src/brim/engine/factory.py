"""Picks an engine by name; the only module that imports a concrete one, and only when asked."""

import importlib.util
import platform
import sys

from brim.core.plan import Plan
from brim.engine.base import Engine
from brim.errors import BrimError, ConfigError

ENGINES = ("llamacpp", "mlx", "toy")
"""Names that `create` knows."""

BACKENDS = {
    "llamacpp": ("llama_cpp",),
    "mlx": ("mlx", "mlx_lm", "tokenizers"),
    "toy": (),
}
"""Packages that an engine cannot do without."""


def create(name: str) -> Engine:
    """A new engine with nothing loaded.

    Raises:
        ConfigError: No such engine, or its backend is not installed; says what to install.
    """
    check_name(name)
    if name == "toy":
        from brim.engine.toy import ToyEngine

        return ToyEngine()
    try:
        if name == "mlx":
            from brim.engine.mlx.engine import MlxEngine

            return MlxEngine()
        from brim.engine.llamacpp.engine import LlamaCppEngine
    except ImportError as exc:
        if name in available_engines():  # it is there, and does not start: another matter
            raise ConfigError(f"the {name} engine cannot be used ({exc}); {_remedy(name)}") from exc
        raise ConfigError(how_to_install(name)) from exc
    return LlamaCppEngine()


def check_name(name: str) -> None:
    """Refuse a name that no engine has.

    Raises:
        ConfigError: It is none of ENGINES.
    """
    if name not in ENGINES:
        raise ConfigError(
            f"no engine named '{name:.40}'; choose one of {', '.join(ENGINES)}", param="engine"
        )


def available_engines() -> frozenset[str]:
    """Engines whose backends are installed here; looks for them and imports none.

    Example:
        >>> "toy" in available_engines()
        True
    """
    return frozenset(
        name
        for name, packages in BACKENDS.items()
        if all(importlib.util.find_spec(package) is not None for package in packages)
    )


def how_to_install(name: str) -> str:
    """One sentence for an engine that is not installed."""
    return f"the {name} engine is not installed here; {_remedy(name)}"


def _remedy(name: str) -> str:
    if name != "mlx":
        return "install it with: pip install llama-cpp-python"
    if sys.platform == "darwin" and platform.machine() != "arm64":
        return "MLX needs Apple silicon: take the model as GGUF, for llama.cpp"
    return "install it with: pip install 'brim[mlx]'"


def defects_of_plan(plan: Plan) -> list[str]:
    """Where a plan's bytes differ from what the backend itself would allocate: a sentence each.

    Asks in a child process, for a file that is here; empty for engines that cannot be asked.
    """
    if plan.engine != "llamacpp" or plan.engine not in available_engines():
        return []
    from brim.engine.llamacpp.dry_run import disagreements, dry_run

    try:
        return disagreements(plan, dry_run(plan))
    except BrimError as error:
        return [f"{plan.model.name} could not be checked with llama.cpp: {error.message}"]
