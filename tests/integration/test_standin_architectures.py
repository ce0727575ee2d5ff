"""Stand-ins of every architecture in llama.cpp itself."""

import json
from pathlib import Path

import numpy as np
import pytest
from support.models import DEMO, plan_for

from brim.bench.standin import ARCHITECTURES, Blueprint, blueprint, clone_blueprint, tiny, write
from brim.bench.standin.slices import sliced
from brim.cli.app import main
from brim.core.sampling import SamplingParams
from brim.core.step import Feed, StepPlan
from brim.engine import factory
from brim.registry.describe import describe_gguf
from brim.registry.ggml_types import FILE_TYPES

PROMPT = tuple(range(3, 43))

QUANTS = ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K_M", "Q4_K_M",
          "Q5_K_M", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4_MOE")  # fmt: skip


def decoded(path: Path) -> list[np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    """Logits after a prompt and after one more token."""
    engine = factory.create("llamacpp")
    engine.load(plan_for("llamacpp", path=path, exact=False, context_tokens=256, kv_tokens=256))
    try:
        seq_id = engine.open(SamplingParams(temperature=0.0, ignore_eos=True))
        token = engine.step(StepPlan((Feed(seq_id, PROMPT),))).sampled[0].token
        found = [engine.logits(seq_id).copy()]
        engine.step(StepPlan((Feed(seq_id, (token,)),)))
        return [*found, engine.logits(seq_id).copy()]
    finally:
        engine.shutdown()


def check(path: Path, model: Blueprint) -> None:
    write(path, model)
    for logits in decoded(path):
        assert np.isfinite(logits).all()
        # Weights that are all zero, or that grow without end, would show here.
        assert 0.1 < float(logits.std()) < 100


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_template_loads_and_decodes_finite_logits(architecture: str, tmp_path: Path) -> None:
    """llama.cpp finds every key and tensor that it wants, and no value overflows."""
    quant = "MXFP4_MOE" if architecture == "gpt-oss" else "Q4_K_M"
    check(tmp_path / "model.gguf", blueprint(tiny(architecture), quant))


@pytest.mark.parametrize("quant", QUANTS)
def test_every_common_quant_decodes_finite_logits(quant: str, tmp_path: Path) -> None:
    """Blocks of each type are valid to the kernels that read them."""
    assert quant in FILE_TYPES.values()
    check(tmp_path / "model.gguf", blueprint(tiny("qwen3moe", num_layers=2), quant))


def test_a_clone_decodes_as_its_original_does(tmp_path: Path) -> None:
    """A published file's keys and tokenizer are copied so that the backend takes them."""
    check(tmp_path / "clone.gguf", clone_blueprint(DEMO))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_slice_loads_and_decodes(architecture: str, tmp_path: Path) -> None:
    """Arrays with an item for each layer are cut with the layers."""
    quant = "MXFP4_MOE" if architecture == "gpt-oss" else "Q4_K_M"
    check(tmp_path / "slice.gguf", sliced(blueprint(tiny(architecture, num_layers=8), quant), 6))


def test_a_standin_is_measured_by_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The built-in model's header, built, loaded in a process of its own, timed and read."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    arguments = ["bench", "standin", "demo", "--ctx", "256", "--prompt", "64", "--generate", "4"]
    assert main([*arguments, "--repetitions", "1", "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["weights_bytes"] == describe_gguf(DEMO).weights_bytes
    # llama.cpp's log has a resolution of 0.01 MiB.
    assert report["kv_bytes"] == pytest.approx(report["planned_kv_bytes"], abs=10_486)
    assert report["decode_tok_s"]["expected"] > 0 < report["prefill_tok_s"]["expected"]
    assert not report["is_scaled"]
    assert list(tmp_path.glob("**/*.gguf")) == []
