"""Set-up for all tests: the environment that backends read once, and which engines must be here."""

import importlib.util
import os
import resource
import tempfile
from pathlib import Path
from unittest import mock

import psutil
import pytest
from hypothesis import HealthCheck, settings
from support.models import EXACT_ENVIRONMENT

from brim.engine.factory import BACKENDS

# ggml and OpenMP read these once a process, so they are set before any backend is loaded.
os.environ.update(EXACT_ENVIRONMENT)

# Everybody's examples are the same ones, so that a change is judged by itself and not by what was
# drawn for it; and none fails because its machine was slow or busy, not even while it is drawn.
# `--hypothesis-profile=explore` draws others each time, and keeps those that fail.
settings.register_profile(
    "same",
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("explore", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("same")

_setrlimit = resource.setrlimit


def _set_limit(kind: int, limits: tuple[int, int]) -> None:
    """All limits but that of open files, which mlx-lm sets when it is imported.

    What tests import must not change it for those that come later, and for what they start.
    """
    if kind != resource.RLIMIT_NOFILE:
        _setrlimit(kind, limits)


mock.patch.object(resource, "setrlimit", _set_limit).start()

RUN = "TEST_RUN_DIRECTORY"
"""A variable that every process of a run has, but those that a test gives nothing of ours."""

END_LIMIT_S = 60.0
"""For processes that a test has ended to be gone: they give memory back first."""


def pytest_configure(config: pytest.Config) -> None:
    """Give the run a temporary directory of its own, which goes with all that was left in it.

    pytest's own, in which failures can be looked into, stays where it is.
    """
    directory = tempfile.TemporaryDirectory(prefix="brim-test-", ignore_cleanup_errors=True)
    config.add_cleanup(directory.cleanup)
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
    os.environ["TMPDIR"] = os.environ[RUN] = tempfile.tempdir = directory.name
    # Calibrations and learnt errors of the machine that runs the tests must not change their plans,
    # and tests neither find prompts or servers of its users nor leave any.
    state = Path(directory.name) / "state"
    state.mkdir(mode=0o700)
    for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR"):
        os.environ[name] = str(state)


@pytest.hookimpl(trylast=True)  # after the fixtures' own ends
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run that leaves processes behind, which would weigh on whatever runs next."""
    _, left = psutil.wait_procs(_processes_of_this_run(), timeout=END_LIMIT_S)
    if not left:
        return
    session.exitstatus = pytest.ExitCode.TESTS_FAILED
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    for process in left:
        if reporter is not None:
            reporter.write_line(f"\nleft behind: {process}", red=True)
        process.kill()


def _processes_of_this_run() -> list[psutil.Process]:
    """All but our own, those included whose parent was killed; what has ended does not count."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(RUN) == os.environ[RUN]:
                found.append(process)
        except psutil.Error:
            continue  # another user's, or it has just ended
    return found


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
