"""The stand-in models of benches/make_standin.py."""

import importlib.util
import itertools
import math
import sys
from pathlib import Path
from types import ModuleType

import gguf
import numpy as np
import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def standin() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("make_standin", ROOT / "benches/make_standin.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_standin"] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def tiny(standin: ModuleType, **changes: object) -> object:
    dimensions = {
        "num_layers": 1, "hidden": 32, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16,
        "feed_forward": 64, "vocab_size": 4200, "context_tokens": 128, "untied": True,
    }  # fmt: skip
    return standin.Shape(**(dimensions | changes))


@pytest.fixture(scope="module")
def written(standin: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> gguf.GGUFReader:
    """A tiny trained-like model, read back from its file."""
    out = tmp_path_factory.mktemp("standin") / "model.gguf"
    standin.write_f16(out, tiny(standin), standin.TOKENIZER, seed=1, trained_like=True)
    return gguf.GGUFReader(out)


def weights(standin: ModuleType, seed: int) -> bytes:
    listed = standin.tensors(tiny(standin), np.random.default_rng(seed), trained_like=True)
    return b"".join(make().tobytes() for _, _, make in listed)


def test_a_seed_gives_the_same_weights_and_another_seed_others(standin: ModuleType) -> None:
    """Equality tests can be repeated."""
    assert weights(standin, 1) == weights(standin, 1) != weights(standin, 2)


def test_a_trained_like_model_has_distinct_rows_and_skewed_logits(
    standin: ModuleType, written: gguf.GGUFReader
) -> None:
    """No two tokens tie exactly, and logits spread as far as the stated perplexity needs."""
    tensors = {tensor.name: tensor.data for tensor in written.tensors}
    head = tensors["output.weight"].astype(np.float32)
    assert len({row.tobytes() for row in head}) == len(head)
    hidden = np.random.default_rng(7).standard_normal((64, head.shape[1]), dtype=np.float32)
    assert float((hidden @ head.T).std()) == pytest.approx(standin.logit_spread(4200), rel=0.2)
    assert abs(float(tensors["output_norm.weight"].mean()) - 1) < 0.05


def test_the_vocabulary_is_the_tokenizers_and_then_distinct_words(
    written: gguf.GGUFReader,
) -> None:
    """Fillers cost the head what real tokens do and are never made by a merge."""
    tokens = written.fields["tokenizer.ggml.tokens"].contents()
    merges = written.fields["tokenizer.ggml.merges"].contents()
    assert tokens[:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert len(tokens) == len(set(tokens)) == 4200
    assert not {merge.replace(" ", "") for merge in merges} & set(tokens[4096:])


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(standin: ModuleType) -> None:
    """Token ids would point past the end of the head."""
    source = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": []}
    with pytest.raises(SystemExit, match="2 tokens, the model only 1"):
        standin.vocabulary(source, 1)


def test_the_parameters_are_those_of_the_tensors(standin: ModuleType) -> None:
    """The count that chooses the layers is the count of what is written."""
    for untied in (False, True):
        shape = tiny(standin, untied=untied)
        listed = standin.tensors(shape, np.random.default_rng(1), trained_like=False)
        assert sum(math.prod(dims) for _, dims, _ in listed) == shape.parameters  # type: ignore[attr-defined]


def test_a_number_of_parameters_chooses_the_layers(standin: ModuleType) -> None:
    """The full shape has 1.24 B, and half of it keeps the widths."""
    full = standin.LLAMA_1B
    assert full.parameters == 1_235_814_400
    assert full.scaled_to(full.parameters) == full
    assert full.scaled_to(7.5e8).num_layers == 8
    assert full.scaled_to(1.0).num_layers == 1


def test_filler_words_never_repeat(standin: ModuleType) -> None:
    """As many as the largest vocabulary needs."""
    words = list(itertools.islice(standin.filler_words(), 130_000))
    assert len(set(words)) == len(words)


def test_a_quant_of_mlx_gives_a_directory(
    standin: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is moved into place whole, and an old one is replaced."""
    out = tmp_path / "model"
    out.mkdir()
    (out / "old").touch()
    monkeypatch.setattr(standin, "LLAMA_113M", tiny(standin, vocab_size=300))
    monkeypatch.setattr(
        sys, "argv", ["make_standin.py", str(out), "--quant", "mlx bf16", "--force"]
    )
    standin.main()
    names = sorted(file.name for file in out.iterdir())
    assert names == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert [each.name for each in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("size", [["--params", "3e8"], ["--vocab", "9000"]])
def test_another_size_is_not_kept_under_the_usual_name(
    standin: ModuleType, monkeypatch: pytest.MonkeyPatch, size: list[str]
) -> None:
    """Later benches would take it for the stand-in that they know."""
    monkeypatch.setattr(sys, "argv", ["make_standin.py", *size])
    with pytest.raises(SystemExit, match="give OUT"):
        standin.main()


def test_the_stand_in_for_mlx_has_over_100_m_parameters(standin: ModuleType) -> None:
    """Smaller ones measure Python."""
    assert 1.0e8 < standin.LLAMA_113M.parameters < 1.2e8
