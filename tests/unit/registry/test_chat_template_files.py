"""Where the chat template of a safetensors directory is found, and which of several counts."""

import json
import shutil
from pathlib import Path

import pytest
from support.models import PYSTD_1M

from brim.errors import ModelFileError
from brim.registry import chat_template
from brim.registry.chat_template import read_chat_template
from brim.registry.describe_safetensors import describe_directory

NAMED = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]


def test_a_directory_is_described_with_its_template(tmp_path: Path) -> None:
    """The description carries the template, which changes nothing about the weights' identity."""
    shutil.copytree(PYSTD_1M, tmp_path, dirs_exist_ok=True)
    plain = describe_directory(tmp_path)
    assert plain.chat_template is not None and "<|im_start|>" in plain.chat_template
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    other = describe_directory(tmp_path)
    assert other.chat_template == "{{ messages }}"
    assert other.fingerprint == plain.fingerprint


def test_the_first_file_counts(tmp_path: Path) -> None:
    """A file of its own, then chat_template.json, then the tokenizer's settings."""
    assert read_chat_template(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "settings"}))
    assert read_chat_template(tmp_path) == "settings"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert read_chat_template(tmp_path) == "json"
    (tmp_path / "chat_template.jinja").write_bytes("größer\r\n".encode())
    assert read_chat_template(tmp_path) == "größer\n"


@pytest.mark.parametrize(
    ("template", "expected"),
    [(NAMED, "plain"), (NAMED[:1], None), ([7], None), (7, None), (None, None)],
)
def test_several_templates(tmp_path: Path, template: object, expected: str | None) -> None:
    """Of several templates with names the default one is meant, and no other stands in."""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    assert read_chat_template(tmp_path) == expected


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_template_without_end(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file far larger than any template is refused by name."""
    monkeypatch.setattr(chat_template, "MAX_TEMPLATE_BYTES", 10)
    source = "x" * 11
    text = source if name.endswith(".jinja") else json.dumps({"chat_template": source})
    (tmp_path / name).write_text(text)
    with pytest.raises(ModelFileError, match=rf"{name} has a chat template of over 10 char"):
        read_chat_template(tmp_path)


def test_a_template_that_is_no_text(tmp_path: Path) -> None:
    """Bytes that are not UTF-8 are a damaged file."""
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe{{")
    with pytest.raises(ModelFileError, match=r"jinja cannot be read .*download it again"):
        read_chat_template(tmp_path)
