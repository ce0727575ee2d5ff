"""What the server's fuzzer calls growth, and what its warm-up sends."""

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHES = Path(__file__).parents[3] / "benches"
MIB = 1 << 20
PART_S = 67.5
"""Of a run of ten minutes."""


@pytest.fixture
def fuzzer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    monkeypatch.setattr(sys, "path", sys.path.copy())  # the script adds to it
    spec = importlib.util.spec_from_file_location("fuzz_server", BENCHES / "fuzz_server.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def is_found(fuzzer: ModuleType, resident_mib: list[float], part_s: float = PART_S) -> bool:
    growth = fuzzer.growth_of([int(each * MIB) for each in resident_mib], part_s)
    return bool(growth.num_bytes > growth.max_bytes)


def test_a_leak_is_growth(fuzzer: ModuleType) -> None:
    """Some kilobytes a second, which warming up cannot explain."""
    assert is_found(fuzzer, [60 + 0.8 * number for number in range(9)])


def test_steps_that_go_on_are_growth(fuzzer: ModuleType) -> None:
    """Three of 4.4 MiB, one of them in the second half, are what this run once had."""
    assert is_found(fuzzer, [60, 64.4, 64.4, 68.8, 68.8, 68.8, 73.2, 73.2, 73.2])


def test_growth_that_has_ended_is_none(fuzzer: ModuleType) -> None:
    """What was reached in the first half and is held at the end is the server's size."""
    assert not is_found(fuzzer, [58, 62, 64, 65, 65.2, 64.1, 66, 65, 66.1])


def test_a_short_run_is_judged_from_its_warm_up(fuzzer: ModuleType) -> None:
    """Its second half is too short for a small growth to mean anything, and a large one counts."""
    assert not is_found(fuzzer, [60, 62, 62, 62, 62, 62, 62, 66, 66], part_s=2.0)
    assert is_found(fuzzer, [60, 62, 65, 67, 69, 70, 72, 74, 76], part_s=2.0)


def test_the_warm_up_sends_every_kind(fuzzer: ModuleType) -> None:
    """Each route by each method, and each damage to a body, as large as it comes."""
    completions = ("/v1/chat/completions", "/v1/completions")
    schemas = {key: {"type": "object"} for key in ("ChatCompletionRequest", "CompletionRequest")}
    document = {"components": {"schemas": schemas}, "paths": {"/health": {}, completions[0]: {}}}
    generator = fuzzer.Generator(random.Random(1), document, ["small"], ["key"])
    sent = [(path, data.partition(b" ")[0], data) for path, data in generator.every_kind()]
    methods = {method for path, method, _ in sent if path == "/health"}
    assert {b"GET", b"POST", b"DELETE", b"BREW"} <= methods
    for path in completions:
        bodies = [data.partition(b"\r\n\r\n")[2] for to, _, data in sent if to == path]
        for sign in (
            b"NaN",
            b"\xff\xfe",
            b"[[[[",
            b'"logit_bias":{"0":1',
            b'"prompt":[7,7',
            b" " * MIB,
        ):
            assert any(sign in body for body in bodies), (path, sign)
    assert len(list(generator.every_break())) >= 6
