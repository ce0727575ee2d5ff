"""What is made of a dry run's child: its answer, its refusal, and no answer at all."""

import json
import subprocess
from typing import Any

import pytest

from brim.core.machine import MachineSpec
from brim.core.model import ModelSpec
from brim.core.plan import Plan
from brim.engine.llamacpp.dry_run import dry_run, parse_log
from brim.errors import EngineError, ModelFileError
from brim.planner.plan import make_plan

LAPTOP = MachineSpec(name="laptop", system="linux", ram_bytes=2**34, others_bytes=0)
SPEC = ModelSpec(
    name="small", paths=("small.gguf",), format="gguf", architecture="llama", fingerprint="f",
    num_parameters=10, weights_bytes=20, num_layers=1, hidden_size=64, num_heads=1,
    num_kv_heads=(1,), key_dim=64, value_dim=64, vocab_size=10, trained_context_tokens=1024,
)  # fmt: skip


@pytest.fixture
def plan() -> Plan:
    return make_plan(SPEC, LAPTOP, engine="llamacpp", context_tokens=512)


def answering(monkeypatch: pytest.MonkeyPatch, code: int, out: str, err: str = "") -> list[Any]:
    """Makes every child end so; gives the command lines that were run."""
    asked = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, code, out, err)

    monkeypatch.setattr(subprocess, "run", run)
    return asked


def test_the_answer_is_read(monkeypatch: pytest.MonkeyPatch, plan: Plan) -> None:
    """Figures come back as the child printed them, and the child imports nothing from here."""
    cache = {"cells": 512, "key_type": "f16", "value_type": "f16", "key_bytes": 3, "value_bytes": 4}
    found = {"weights_bytes": 7, "caches": [cache], "compute_bytes": 5, "output_bytes": 6}
    asked = answering(monkeypatch, 0, json.dumps({"found": [found], "error": None}))
    assert dry_run(plan).kv_bytes == 7
    assert "-P" in asked[0]


@pytest.mark.parametrize("out", ["", "GGML_ASSERT failed", '{"found": 3}', '{"found": [{}]}'])
def test_no_answer_is_an_engine_error(
    monkeypatch: pytest.MonkeyPatch, plan: Plan, out: str
) -> None:
    """Whatever else stands on the child's output is one sentence, not a traceback."""
    answering(monkeypatch, 0, out)
    with pytest.raises(EngineError, match="the dry run of small gave no answer that can be read"):
        dry_run(plan)


def test_a_dead_child_and_a_refusal_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, plan: Plan
) -> None:
    """A child that died is the engine's error, a file that llama.cpp refuses the file's."""
    answering(monkeypatch, -6, "", "first\nGGML_ASSERT(n > 0) failed")
    with pytest.raises(EngineError, match=r"ended with -6: GGML_ASSERT\(n > 0\) failed"):
        dry_run(plan)
    answering(monkeypatch, 0, json.dumps({"error": "unknown architecture"}))
    with pytest.raises(ModelFileError, match=r"small\.gguf: llama\.cpp refuses it: unknown"):
        dry_run(plan)


def test_log_lines_of_one_context_add_up() -> None:
    """Buffers of one kind are added, and lines that say nothing of memory are passed over."""
    lines = [
        "sched_reserve:        CPU compute buffer size =     1.50 MiB",
        "sched_reserve:  CUDA_Host compute buffer size =     0.50 MiB",
        "llama_context:        CPU  output buffer size =     0.25 MiB",
        "something else",
    ]
    found = parse_log(lines, 9)
    assert (found.compute_bytes, found.output_bytes, found.weights_bytes) == (2**21, 2**18, 9)
    assert found.caches == ()
