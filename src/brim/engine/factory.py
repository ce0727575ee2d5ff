"""Picks an engine by name; the only module that imports a concrete one, and only when asked."""

from brim.engine.base import Engine
from brim.errors import ConfigError

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
