"""`brim plan`: what it says of models and machines, and how it refuses."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.models import DEMO, PYSTD_1M

from brim.cli import plan_together
from brim.cli.app import main
from brim.cli.dispatch import choose_form
from brim.cli.neighbours import forecast_history
from brim.ledger.correction import TOTAL
from brim.machine.reading import read_machine
from brim.planner.fit import Room
from brim.planner.plan import make_plan
from brim.registry.sources import describe
from brim.runtime.forecast_errors import subject_of

NUMBERS = (
    "weights_bytes", "kv_bytes", "compute_bytes", "overhead_bytes", "total_bytes", "budget_bytes",
)  # fmt: skip


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    code = main(["plan", *arguments, "--json"])
    out, err = capsys.readouterr()
    assert err == ""
    return code, json.loads(out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", *arguments]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def test_json_has_the_promised_fields(capsys: pytest.CaptureFixture[str]) -> None:
    """Terms are whole bytes that add up, speeds are ranges in order, and reasons are given."""
    code, plan = planned(capsys, "llama-3.1-8b", "--quant", "Q4_K_M", "--machine", "M4:10:16")
    assert code == 0
    assert plan["fits"] is True
    assert plan["verdict"] in ("comfortable", "tight")
    assert all(isinstance(plan[name], int) for name in NUMBERS)
    parts = [*NUMBERS[:4], "repacked_bytes"]
    assert plan["total_bytes"] == sum(plan[name] for name in parts) <= plan["budget_bytes"]
    for name in ("decode_tok_s", "prefill_tok_s"):
        assert 0 < plan[name]["low"] <= plan[name]["expected"] <= plan[name]["high"]
    assert plan["decode_tok_s"]["high"] <= plan["models"][0]["decode_ceiling_tok_s"]
    assert (plan["engine"], plan["kv_type"]) == ("llamacpp", "q8_0")
    assert {"kv_type", "context_tokens", "engine", "num_threads"} <= plan["reasons"].keys()


@pytest.mark.parametrize(
    ("arguments", "engine", "quant", "why"),
    [
        (("qwen3-8b",), "mlx", "MLX 4bit", "MLX is the default on Apple silicon"),
        (("qwen3-8b", "--engine", "llamacpp"), "llamacpp", "Q4_K_M", "asked for"),
        (("qwen3-8b:Q8_0",), "llamacpp", "Q8_0", "the model is in GGUF form"),
        (("qwen3-8b", "--quant", "MLX 8bit"), "mlx", "MLX 8bit", "in safetensors form"),
        (("qwen3-0.6b",), "llamacpp", "Q4_K_M", "the model is in GGUF form"),
    ],
)
def test_the_engine_follows_from_machine_form_and_wish(
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    engine: str,
    quant: str,
    why: str,
) -> None:
    """On a Mac a model comes in MLX form where it has one, unless a quant or an engine is named."""
    _, plan = planned(capsys, *arguments, "--machine", "M4 Pro:20:48")
    (model,) = plan["models"]
    assert (model["engine"], model["quant"]) == (engine, quant)
    assert why in plan["reasons"]["engine"]


def test_what_does_not_fit_exits_3_with_three_ways(capsys: pytest.CaptureFixture[str]) -> None:
    """A refusal says how many bytes are short and names the three cheapest ways."""
    code, plan = planned(capsys, "llama-3.3-70b", "--quant", "Q4_K_M", "--machine", "M4 Max:40:48")
    assert code == 3
    assert (plan["fits"], plan["verdict"]) == (False, "no")
    assert plan["short_bytes"] == plan["total_bytes"] - plan["budget_bytes"] > 0
    assert len(plan["ways_to_fit"]) == 3


def test_a_pair_shares_one_budget(capsys: pytest.CaptureFixture[str]) -> None:
    """A draft is planned beside its target: bytes are summed, speeds are the target's."""
    arguments = ("qwen3-8b", "--draft", "qwen3-0.6b", "--machine", "M4:10:16")
    _, both = planned(capsys, *arguments)
    _, alone = planned(capsys, "qwen3-8b", "--machine", "M4:10:16", "--engine", "llamacpp")
    # One process holds both, and the catalogue has the draft in GGUF form alone.
    assert [model["engine"] for model in both["models"]] == ["llamacpp", "llamacpp"]
    assert [model["role"] for model in both["models"]] == ["target", "draft"]
    assert both["total_bytes"] == sum(model["total_bytes"] for model in both["models"])
    assert both["budget_bytes"] == alone["budget_bytes"]
    assert both["decode_tok_s"] == alone["decode_tok_s"]


def test_a_config_is_planned_with_a_quant(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A bare config.json takes --quant or a quant behind it, and is said to be estimated."""
    config = {
        "model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 8192,
        "vocab_size": 128256, "tie_word_embeddings": True, "max_position_embeddings": 131072,
    }  # fmt: skip
    path = tmp_path / "small" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(config))
    _, plan = planned(capsys, str(path), "--quant", "Q4_K_M", "--machine", "m4-16")
    _, same = planned(capsys, f"{path}:Q4_K_M", "--machine", "m4-16")
    assert plan == same
    (model,) = plan["models"]
    assert (model["model"], model["weights_are_estimated"]) == ("small", True)
    assert any("about 1 %" in note for note in plan["notes"])
    assert "config.json does not say which quant" in refused(capsys, str(path))


def test_the_demo_is_planned_for_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    """A file that is here is checked with llama.cpp's own dry run, which finds no defect."""
    code, plan = planned(capsys, "demo")
    assert code == 0
    assert plan["notes"] == []
    assert plan["decode_tok_s"]["expected"] > 0


def test_people_read_terms_speeds_and_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    """The page has the verdict, every term, the speeds and the reason for each choice."""
    assert main(["plan", "qwen3-8b", "--machine", "M4 Pro:20:48"]) == 0
    page = capsys.readouterr().out
    for words in ("fits comfortably", "weights", "KV", "decode, full", "first token", "why"):
        assert words in page


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("qwen3-8b", "--machine", "M9"), "M9"),
        (("qwen3-8b", "--kv", "q9_9", "--machine", "m4-16"), "q8_0"),
        (("qwen3-8b", "--kv", "f16/f16/f16", "--machine", "m4-16"), "more than two KV types"),
        (("qwen3-0.6b", "--engine", "mlx", "--machine", "m4-16"), "leave --engine out"),
        (("qwen3-8b", "--engine", "cuda", "--machine", "m4-16"), "one of llamacpp, mlx, toy"),
        (("qwen3-8b", "--machine", "m4-16", "--what-if"), "leave --machine out"),
        (("no-such-model", "--machine", "m4-16"), "no-such-model"),
    ],
)
def test_wishes_that_cannot_be_met_are_one_sentence(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    """A refusal names what was wrong and what to do, on one line."""
    assert words in refused(capsys, *arguments)


def test_what_earlier_loads_took_is_counted(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model whose loads took more than planned is granted more, and both figures are said."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    machine = read_machine()
    spec = describe("demo")
    plan = make_plan(spec, machine, engine="llamacpp")
    history = forecast_history()
    for number in range(4):
        total = plan.memory.total_bytes
        history.record(
            subject_of(plan, machine), f"load {number}", {TOTAL: (total, total * 6 // 5)}
        )
    _, said = planned(capsys, "demo", "--no-check")
    (note,) = said["notes"]
    assert "earlier loads differed from their plans" in note
    assert said["total_bytes"] == said["models"][0]["total_bytes"]


@pytest.mark.parametrize(("model_type", "is_guessed"), [("llama", False), ("newest", True)])
def test_a_guessed_architecture_is_said(
    model_type: str, is_guessed: bool, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A config of an architecture that brim has no description of is planned with a warning."""
    config = {
        "model_type": model_type, "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 1000,
        "num_attention_heads": 4, "intermediate_size": 128, "max_position_embeddings": 4096,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    _, said = planned(
        capsys, str(tmp_path / "config.json"), "--quant", "Q8_0", "--machine", "m4-16"
    )
    assert any("plain transformer" in note for note in said["notes"]) is is_guessed


def test_a_draft_takes_the_engine_of_its_target(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A target that left the default engine for want of room takes its draft along."""
    pair = [tmp_path / "target", tmp_path / "draft"]
    for directory in pair:
        shutil.copytree(PYSTD_1M, directory)
        shutil.copy(DEMO, directory / "demo-Q8_0.gguf")
    chosen: list[str] = []

    def choose(forms: Any, machine: Any, **wishes: Any) -> Any:
        # MLX's libraries alone take more than that before a weight is read.
        wishes["room"] = wishes["room"] if chosen else Room(2**27, 2**27)
        found = choose_form(forms, machine, **wishes)
        chosen.append(found.engine)
        return found

    monkeypatch.setattr(plan_together, "choose_form", choose)
    command = (str(pair[0]), "--draft", str(pair[1]), "--machine", "m4-16", "--no-check")
    _, plan = planned(capsys, *command)
    assert [model["engine"] for model in plan["models"]] == ["llamacpp", "llamacpp"]


def test_wiring_is_said_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    """One model for one sequence that fills most of a GPU's share is wired; a small one is not."""
    code, report = planned(capsys, "llama-3.3-70b:4bit", "--machine", "m4-max-64", "--ctx", "2048")
    assert code == 0
    assert report["models"][0]["wire_weights"]
    assert "over 60 %" in report["models"][0]["reasons"]["wire_weights"]
    _, small = planned(capsys, str(PYSTD_1M), "--machine", "m4-16")
    assert not small["models"][0]["wire_weights"]
    main(["plan", str(PYSTD_1M), "--machine", "m4-16"])
    assert "wiring" in capsys.readouterr().out
