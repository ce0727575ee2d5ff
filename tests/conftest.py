"""Set-up for all tests: the environment that backends read once, and which engines must be here."""

import importlib.util
import os
import tempfile

import pytest
from support.models import EXACT_ENVIRONMENT

from brim.engine.factory import BACKENDS

# ggml and OpenMP read these once a process, so they are set before any backend is loaded.
os.environ.update(EXACT_ENVIRONMENT)

# Calibrations and learnt errors of the machine that runs the tests must not change their plans, and
# tests neither find prompts or servers of its users nor leave any.
_STATE = tempfile.TemporaryDirectory(prefix="brim-test-state-")
for _name in ("XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR"):
    os.environ[_name] = _STATE.name


def require_engine(name: str) -> None:
    """Skip where an engine's backend is missing, or fail where BRIM_REQUIRE_ENGINES names it.

    In a test, a fixture, or at the head of a module that cannot even be imported without it.
    """
    missing = [package for package in BACKENDS[name] if importlib.util.find_spec(package) is None]
    if not missing:
        return
    message = f"{', '.join(missing)} of the {name} engine is not installed"
    if name in os.environ.get("BRIM_REQUIRE_ENGINES", "").split(","):
        pytest.fail(f"{message}, and BRIM_REQUIRE_ENGINES names it")
    pytest.skip(message, allow_module_level=True)
