"""Whatever a user gets wrong: one sentence, an exit code, and no traceback."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[2] / "src" / "brim" / "registry" / "data" / "demo.gguf"


def brim(
    tmp_path: Path, *arguments: str, stdin: bytes = b"", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the real command with nothing of the user's own settings or servers."""
    tmp_path.chmod(0o700)  # as a runtime directory must be
    own = {name: str(tmp_path) for name in ("HOME", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR")}
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("BRIM_", "HF_"))}
    result = subprocess.run(
        [sys.executable, "-m", "brim", *arguments],
        input=stdin,
        capture_output=True,
        timeout=60,
        check=False,
        env={**kept, **own, **environment},
    )
    return subprocess.CompletedProcess(
        result.args, result.returncode, result.stdout.decode(), result.stderr.decode()
    )


def sentence_of(result: subprocess.CompletedProcess[str], code: int, *, notes: int = 0) -> str:
    """The one sentence on stderr, after `notes` other lines; nothing went to stdout."""
    assert "Traceback" not in result.stderr
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == notes + 1, result.stderr
    assert re.fullmatch(r"brim: \S.{10,}", lines[-1])
    return lines[-1]


def test_a_missing_file(tmp_path: Path) -> None:
    """A model file that is not there is named."""
    path = tmp_path / "none.gguf"
    assert str(path) in sentence_of(brim(tmp_path, "run", "-m", str(path), "hi"), 1)


def test_an_unknown_name(tmp_path: Path) -> None:
    """A name that no model has says what names look like."""
    assert "hf:" in sentence_of(brim(tmp_path, "run", "-m", "no-such-model", "hi"), 1)


@pytest.mark.parametrize("content", [b"", b"this is no model\n" * 100, b"GGUF", bytes(4096)])
def test_files_that_are_no_models(tmp_path: Path, content: bytes) -> None:
    """Empty files, text and zeros with a model's name are refused by name."""
    path = tmp_path / "fake.gguf"
    path.write_bytes(content)
    assert "fake.gguf" in sentence_of(brim(tmp_path, "run", "-m", str(path), "hi"), 1)


@pytest.mark.parametrize("percent", [1, 50, 99])
def test_a_model_that_was_cut_short(tmp_path: Path, percent: int) -> None:
    """A download that broke off is refused before anything is loaded."""
    whole = DEMO.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[: len(whole) * percent // 100])
    for command in ("run", "serve"):
        arguments = ("hi",) if command == "run" else ("--port", "0")
        result = brim(tmp_path, command, "-m", str(path), *arguments)
        assert "cut.gguf" in sentence_of(result, 1)


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems take UTF-8 names only")
def test_a_path_that_is_no_text(tmp_path: Path) -> None:
    """A model whose path is not UTF-8 is refused with the byte, not with a codec's complaint."""
    path = tmp_path / os.fsdecode(b"S\xe3o.gguf")
    path.symlink_to(DEMO)
    text = sentence_of(brim(tmp_path, "run", "-m", str(path), "hi"), 1)
    assert r"S\xe3o.gguf is not UTF-8; rename" in text


def test_a_stray_byte_in_the_prompt(tmp_path: Path) -> None:
    """A prompt with a byte that is no UTF-8 is answered."""
    prompt = os.fsdecode(b"S\xe3o Paulo")
    result = brim(tmp_path, "run", "-m", "demo", "--temp", "0", "-n", "4", prompt)
    assert result.returncode == 0, result.stderr


def test_a_directory(tmp_path: Path) -> None:
    """A directory in place of a model file says what to name instead."""
    assert str(tmp_path) in sentence_of(brim(tmp_path, "run", "-m", str(tmp_path), "hi"), 1)


def test_nothing_to_answer(tmp_path: Path) -> None:
    """No prompt and nothing piped in is bad usage."""
    assert "give a PROMPT or pipe one in" in sentence_of(brim(tmp_path, "run"), 2)


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "--temp", "-1", "x"),
        ("run", "-n", "0", "x"),
        ("run", "--seed", "99999999999", "x"),
        ("serve", "--port", "70000"),
        ("serve", "--ctx", "0"),
        ("convert", "only-one-argument"),
        ("frobnicate",),
    ],
)
def test_bad_usage(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """Values out of range and unknown commands are bad usage."""
    assert "--help" in sentence_of(brim(tmp_path, *arguments), 2)


def test_a_context_beyond_training(tmp_path: Path) -> None:
    """A window longer than the model's is refused with both numbers."""
    text = sentence_of(brim(tmp_path, "run", "-m", "demo", "--ctx", "9000", "hi"), 1)
    assert "8192" in text
    assert "9000" in text


def test_a_prompt_beyond_the_window(tmp_path: Path) -> None:
    """A prompt longer than the window is refused with the numbers, not cut."""
    arguments = ("run", "-m", "demo", "--ctx", "256", "--raw")
    text = sentence_of(brim(tmp_path, *arguments, stdin=b"one two three " * 500), 1)
    assert "256" in text


def test_wrong_settings(tmp_path: Path) -> None:
    """A misspelt key and a misspelt variable are found by the real command too."""
    path = tmp_path / "brim.toml"
    path.write_text("[server]\nport = 'x'\n")
    text = sentence_of(brim(tmp_path, "config", "show", BRIM_CONFIG=str(path)), 1)
    assert f"{path}:2" in text
    text = sentence_of(brim(tmp_path, "config", "show", BRIM_SERVER_PROT="1"), 1)
    assert "did you mean BRIM_SERVER_PORT?" in text


@pytest.mark.parametrize("command", ["ps", "stop"])
def test_no_server(tmp_path: Path, command: str) -> None:
    """Commands for a running server say how to start one."""
    assert "brim serve" in sentence_of(brim(tmp_path, command), 1)


def test_a_port_in_use(tmp_path: Path) -> None:
    """A port that another program listens on is named before any model is loaded."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = brim(tmp_path, "serve", "-m", "toy", "--port", str(port))
    assert str(port) in sentence_of(result, 1)


def test_a_runtime_directory_that_cannot_be_written(tmp_path: Path) -> None:
    """A server that cannot say that it runs does not start, and names the directory."""
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    (runtime / "brim").write_text("a file where the directory should be, root or not")
    arguments = ("serve", "-m", "toy", "--port", "0")
    result = brim(tmp_path, *arguments, XDG_RUNTIME_DIR=str(runtime))
    assert f"{runtime / 'brim'} cannot be written" in sentence_of(result, 1)


def test_what_does_not_fit(tmp_path: Path) -> None:
    """A model that is too large for the machine is refused with code 3 before it is loaded."""
    path = tmp_path / "huge.gguf"
    make_huge_model(path)
    text = sentence_of(brim(tmp_path, "run", "-m", str(path), "hi"), 3)
    assert "GiB" in text
    assert "--force" in text


def make_huge_model(path: Path) -> None:
    """A GGUF whose header and size are those of a 400 GiB model, in a file with a hole."""
    from gguf import GGMLQuantizationType, GGUFWriter

    num_layers, width = 100, 32_768
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(num_layers)
    writer.add_context_length(8192)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(width)
    writer.add_head_count(64)
    writer.add_vocab_size(32)
    import numpy as np

    size = 0
    for layer in range(num_layers):
        num_bytes = width * width * 4
        writer.add_tensor_info(
            f"blk.{layer}.ffn_up.weight", (width, width), np.dtype(np.float32), num_bytes,
            raw_dtype=GGMLQuantizationType.F32,
        )  # fmt: skip
        size += num_bytes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, path.stat().st_size + 64 + size)
