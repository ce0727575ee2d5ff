"""What a worker inherits, and how its end is put in words."""

import msgspec
import pytest
from support.models import plan_for

from brim.runtime.worker_process import _exit_in_words, worker_environment


def test_a_worker_inherits_what_a_process_needs_and_nothing_that_tunes_threads() -> None:
    """The plan has measured its settings; a shell's leftovers must not change them."""
    plan = msgspec.structs.replace(plan_for("toy"), environment={"OMP_WAIT_POLICY": "passive"})
    inherited = {
        "PATH": "/bin", "LC_ALL": "C", "PYTHONPATH": "x", "OMP_NUM_THREADS": "64",
        "GGML_CPU_TILED_MM": "0", "OMP_WAIT_POLICY": "active", "HF_TOKEN": "secret",
    }  # fmt: skip
    assert worker_environment(plan, inherited) == {
        "PATH": "/bin",
        "LC_ALL": "C",
        "PYTHONPATH": "x",
        "OMP_WAIT_POLICY": "passive",
    }


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
    assert _exit_in_words(exit_code) == words
