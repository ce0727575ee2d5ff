"""Model directories whose text files are missing, damaged or of another kind."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import require_engine

require_engine("mlx")

from support.made_tokenizers import tokenizer_json, write_tokenizer

from brim.engine.mlx.tokenizer import HfTokenizer
from brim.engine.mlx.tokenizer_files import read_text_settings
from brim.errors import ModelFileError


def refused(directory: Path) -> str:
    """The sentence with which a directory is refused; one line, and naming a file or the way."""
    with pytest.raises(ModelFileError) as caught:
        HfTokenizer.from_directory(directory, 4096)
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 500
    return caught.value.message


def test_no_tokenizer_at_all(tmp_path: Path) -> None:
    """A directory without tokenizer.json says what to get instead."""
    assert "has no tokenizer.json; get a copy of the model that has one" in refused(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json", "qwen.tiktoken"])
def test_another_kind_of_tokenizer(tmp_path: Path, name: str) -> None:
    """What is there instead is named, and not read."""
    (tmp_path / name).write_bytes(b"\x00")
    (tmp_path / "tokenization_code.py").write_text("raise SystemExit")
    message = refused(tmp_path)
    assert f"(only {name}, which the mlx engine does not read)" in message
    assert "GGUF" in message


def cut_short(text: str) -> str:
    return text[: len(text) // 2]


def without_model(text: str) -> str:
    return json.dumps({k: v for k, v in json.loads(text).items() if k != "model"})


def with_change(**changes: Any) -> Callable[[str], str]:
    return lambda text: json.dumps(json.loads(text) | changes)


UNKNOWN_MERGE = {"type": "BPE", "vocab": {"a": 0}, "merges": [["b", "c"]]}
ADDED = {
    "id": -1, "content": "<x>", "single_word": False, "lstrip": False, "rstrip": False,
    "normalized": False, "special": True,
}  # fmt: skip


@pytest.mark.parametrize(
    "damage",
    [
        cut_short,
        without_model,
        lambda _: "[]",
        lambda _: '{"a": ' + "[" * 10_000,
        with_change(model=UNKNOWN_MERGE),
        with_change(model=7),
        with_change(added_tokens="none"),
        with_change(added_tokens=[ADDED]),
        with_change(added_tokens=[ADDED | {"id": 2**40}]),
        with_change(decoder=[1]),
        with_change(decoder={"type": "Sequence", "decoders": 3}),
        with_change(decoder={"type": "Unheard"}),
        with_change(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}}),
    ],
)
def test_a_damaged_tokenizer(tmp_path: Path, damage: Callable[[str], str]) -> None:
    """It is named in one sentence, whether brim or the library notices."""
    write_tokenizer(tmp_path, "qwen2")
    path = tmp_path / "tokenizer.json"
    path.write_text(damage(tokenizer_json("qwen2")))
    assert str(path) in refused(tmp_path)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    """A binary file under the name of a tokenizer is damaged."""
    (tmp_path / "tokenizer.json").write_bytes(b'{"model": "\xff\xfe"}')
    assert "is damaged" in refused(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"bos_token": 5}),
        ("tokenizer_config.json", {"eos_token": {"content": ["x"]}}),
        ("tokenizer_config.json", {"add_bos_token": "yes"}),
        ("tokenizer_config.json", []),
        ("config.json", {"eos_token_id": "2"}),
        ("config.json", {"bos_token_id": True}),
        ("generation_config.json", {"eos_token_id": [1, None]}),
        ("special_tokens_map.json", {"eos_token": 2.5}),
    ],
)
def test_settings_of_another_kind(tmp_path: Path, name: str, content: Any) -> None:
    """A value that cannot be what its key says is an error, not a default."""
    write_tokenizer(tmp_path, "qwen2")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / name).write_text(json.dumps(content))
    assert "is damaged" in refused(tmp_path)


def test_no_settings_at_all(tmp_path: Path) -> None:
    """tokenizer.json alone is enough: nothing is known of begin and end, and names still end."""
    (tmp_path / "tokenizer.json").write_text(tokenizer_json("qwen2"), encoding="utf-8")
    settings = read_text_settings(tmp_path)
    assert (settings.bos, settings.eos, settings.add_bos) == (None, None, None)
    assert len(HfTokenizer.from_directory(tmp_path).eog_tokens) == 3


def test_an_explicit_none_outweighs_an_id(tmp_path: Path) -> None:
    """`"bos_token": null` means that there is none, whatever id the config still carries."""
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": null}')
    (tmp_path / "config.json").write_text('{"bos_token_id": 7, "eos_token_id": 8}')
    settings = read_text_settings(tmp_path)
    assert (settings.bos, settings.eos) == (None, 8)
