"""Picks an engine by name; the only module that imports a concrete one, and only when asked."""

from brim.core.plan import Plan
from brim.engine.base import Engine
from brim.errors import BrimError, ConfigError

ENGINES = ("llamacpp", "toy")
"""Names that `create` knows."""


def create(name: str) -> Engine:
    """A new engine with nothing loaded.

    Raises:
        ConfigError: No such engine, or its backend is not installed; says what to install.
    """
    if name == "toy":
        from brim.engine.toy import ToyEngine

        return ToyEngine()
    if name == "llamacpp":
        try:
            from brim.engine.llamacpp.engine import LlamaCppEngine
        except ImportError as exc:
            raise ConfigError(
                "the llama.cpp engine is missing; install it with: pip install llama-cpp-python"
            ) from exc
        return LlamaCppEngine()
    raise ConfigError(f"no engine named '{name}'; choose one of {', '.join(ENGINES)}")


def defects_of_plan(plan: Plan) -> list[str]:
    """Where a plan's bytes differ from what the backend itself would allocate: a sentence each.

    Asks in a child process, for a file that is here; empty for engines that cannot be asked.
    """
    if plan.engine != "llamacpp":
        return []
    try:
        from brim.engine.llamacpp.dry_run import disagreements, dry_run

        return disagreements(plan, dry_run(plan))
    except ImportError:
        return []
    except BrimError as error:
        return [f"{plan.model.name} could not be checked with llama.cpp: {error.message}"]
