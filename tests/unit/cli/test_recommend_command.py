"""`brim recommend`: models for a machine, machines for a model, and how it refuses."""

import json
from typing import Any

import pytest
from support.models import PYSTD_1M

from brim.cli import recommend_plans
from brim.cli.app import main
from brim.core.machine import MachineSpec
from brim.machine import reading
from brim.registry.catalogue import entries

LINUX = MachineSpec(name="m", system="linux", ram_bytes=2**34, others_bytes=2**32, is_at_hand=False)


def report(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    code = main(["recommend", *arguments, "--json"])
    out, err = capsys.readouterr()
    assert err == ""
    return code, json.loads(out)


def test_models_are_ranked_with_figures(capsys: pytest.CaptureFixture[str]) -> None:
    """Each model has a footprint within the budget, a verdict, speeds, a band and its reason."""
    code, said = report(capsys, "--machine", "M4 Pro:20:48", "--use", "embed", "--limit", "3")
    assert code == 0
    assert said["fits"] is True
    assert said["use"] == "embed"
    assert said["num_models"] > len(said["models"]) == 3
    for row in said["models"]:
        best = row["best"]
        assert best["verdict"] == "comfortable"
        assert best["footprint_bytes"] > best["weights_bytes"] > 0
        assert best["footprint_bytes"] <= said["comfortable_bytes"] == best["budget_bytes"]
        assert best["pull"].startswith("hf:")
        assert 1 < best["bits_per_weight"] < 33
        assert best["prefill_tok_s"]["low"] <= row["band_tok_s"] <= best["prefill_tok_s"]["high"]
        assert row["band"] in ("interactive", "usable", "batch only")
        assert row["reason"]
        assert "embed" in row["uses"]
        assert {best["quant"], *(other["quant"] for other in row["other_quants"])} >= {"F16"}


def test_the_table_names_machine_models_and_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    """People read the budget, one line for each model and the reason for its place."""
    assert main(["recommend", "--machine", "m4-16", "--use", "embed", "--limit", "2"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert err == ""
    assert lines[0].startswith("M4:8:16: 16.00 GiB of memory, 11.20 GiB for models")
    assert "quality cost (Llama 3 8B)" in lines[1]
    assert lines[2].startswith("1  ")
    assert lines[4].startswith("1. ")
    assert "tok/s" not in lines[1]  # embedders do not decode
    assert lines[-1].startswith("2 of ")
    assert "at 8192 tokens of context, or a model's own where that is shorter" in lines[-1]


def test_embedders_have_no_decode_speed(capsys: pytest.CaptureFixture[str]) -> None:
    """Their speed is what they read, and each is planned within its own context."""
    _, models = report(capsys, "--machine", "m4-16", "--use", "embed")
    assert models["context_tokens"] == 8192
    own = {row["model"]: row["best"]["context_tokens"] for row in models["models"]}
    assert own["nomic-embed-text-v1.5"] == 2048
    assert {row["best"]["decode_tok_s"] for row in models["models"]} == {None}


def test_machines_for_an_embedder_are_judged_by_what_they_read(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """There is no decode speed of a model that does not decode."""
    _, machines = report(capsys, "--for", "bge-m3", "--limit", "1")
    assert machines["use"] == "embed"
    (row,) = machines["machines"]
    assert row["decode_tok_s"] is row["full_decode_tok_s"] is None
    assert row["prefill_tok_s"]["expected"] > 0


@pytest.mark.parametrize(("machine", "is_ranked"), [("M4 Pro:20:48", True), (None, False)])
def test_mlx_forms_are_ranked_where_mlx_is_the_default(
    machine: str | None,
    is_ranked: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a Mac each MLX form of a model is a candidate, elsewhere none is."""
    monkeypatch.setattr(reading, "read_machine", lambda: LINUX)
    few = [entry for entry in entries() if entry.mlx][:4]  # all of them take seconds
    monkeypatch.setattr(recommend_plans, "entries", lambda: few)
    named = () if machine is None else ("--machine", machine)
    _, models = report(capsys, *named, "--limit", "100")
    for row in models["models"]:
        quants = {row["best"]["quant"], *(other["quant"] for other in row["other_quants"])}
        assert (row["mlx"].keys() <= quants) if is_ranked else not (row["mlx"].keys() & quants)
        assert (row["engine"] == "mlx") == row["best"]["quant"].startswith("MLX")
    assert any(row["mlx"] for row in models["models"])


@pytest.mark.parametrize(
    ("model", "engine", "quant"),
    [
        ("Qwen3-8B-MLX-4bit", "mlx", "MLX 4bit"),
        ("Qwen3-8B", "mlx", "MLX 4bit"),
        ("Qwen3-8B:Q4_K_M", "llamacpp", "Q4_K_M"),
    ],
)
def test_machines_are_judged_by_the_form_they_would_run(
    model: str, engine: str, quant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where no quant is named, Macs take the MLX form of a model that has one."""
    _, machines = report(capsys, "--for", model, "--limit", "1")
    assert (machines["engine"], machines["quant"]) == (engine, quant)


def test_machines_that_run_a_model_come_by_memory(capsys: pytest.CaptureFixture[str]) -> None:
    """The reverse lists machines that hold the model, least memory first, with speeds."""
    code, said = report(capsys, "--for", "Qwen3-14B:Q8_0", "--limit", "400")
    assert code == 0
    assert said["quant"] == "Q8_0"
    assert said["use"] == "chat"
    sizes = [row["ram_bytes"] for row in said["machines"]]
    assert len(sizes) == said["num_machines"]
    assert sizes == sorted(sizes)
    assert said["least_ram_bytes"]["tight"] == sizes[0] == 24 * 2**30
    for row in said["machines"]:
        assert row["footprint_bytes"] <= row["budget_bytes"]
        assert row["verdict"] in ("comfortable", "tight")
        assert row["decode_tok_s"]["low"] <= row["decode_tok_s"]["expected"]


def test_the_reverse_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    """People read what the model takes, from how much memory on, and the machines."""
    assert main(["recommend", "--for", "qwen3:8b", "--limit", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("qwen3-8b in MLX 4bit takes ")
    assert "comfortable from" in lines[0]
    assert lines[1].split()[:2] == ["machine", "memory"]
    assert lines[-1].startswith("1 of ")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--for", "DeepSeek-R1:Q8_0"], 3, "the largest known machine"),
        (["--for", "qwen3:9b"], 1, "Qwen3-8B"),
        (["--machine", "M9 Max"], 1, "no M9 Max"),
        (["--for", "qwen3:8b", "--machine", "m4-16"], 2, "leave one out"),
        (["--use", "poetry"], 2, "'chat', 'code', 'long', 'embed'"),
        (["--limit", "0"], 2, "--limit"),
        (["--for", str(PYSTD_1M / "config.json")], 1, "config.json:Q4_K_M"),
    ],
)
def test_refusals_are_one_sentence(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str
) -> None:
    """What cannot be answered gets one line on stderr and its exit code: 1, 2, or 3 for no room."""
    assert main(["recommend", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.count("\n") == 1
