"""A damaged GGUF file never gets past the registry's errors."""

import functools
import tempfile
from pathlib import Path

import numpy as np
from gguf import GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from brim.core.model import ModelSpec
from brim.errors import ModelFileError, NotFound
from brim.registry.describe import describe_gguf
from brim.registry.gguf_header import GgufHeader, read_gguf_header


@functools.cache
def model_bytes() -> bytes:
    """A model of two layers with every kind of value, as the gguf package writes it."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.gguf"
        writer = GGUFWriter(path, "llama")
        writer.add_context_length(512)
        writer.add_embedding_length(64)
        writer.add_block_count(2)
        writer.add_head_count(4)
        writer.add_head_count_kv([2, 0])
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(["<|end|>", "a", "b", "", "ä"])
        writer.add_token_scores([0.0, 0.5, 1.0, 1.5, 2.0])
        writer.add_add_bos_token(True)
        writer.add_chat_template("{{ messages }}")
        for name in ("token_embd.weight", "blk.0.attn_q.weight", "blk.1.attn_q.weight"):
            writer.add_tensor(name, np.zeros((4, 64), np.float32))
        writer.add_tensor("output_norm.weight", np.ones(64, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


# Damage in the header is what is parsed, so half of it is aimed there.
HEADER_BYTES = 1024

places = st.one_of(st.integers(0, HEADER_BYTES - 1), st.integers(0, 4096))
flips = st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=8)
words = st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1])
word_writes = st.lists(st.tuples(places, words), max_size=3)


def outcomes(data: bytes) -> tuple[GgufHeader | None, ModelSpec | None]:
    """Header and description of a file of these bytes; None for each that is refused."""
    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        file.write(data)
        file.flush()
        try:
            header = read_gguf_header(file.name)
        except (ModelFileError, NotFound) as exc:
            assert file.name in exc.message
            return None, None
        try:
            return header, describe_gguf(file.name)
        except (ModelFileError, NotFound) as exc:
            assert file.name in exc.message
            return header, None


def test_the_undamaged_file_is_accepted() -> None:
    """The file that the other tests damage is a good one."""
    header, spec = outcomes(model_bytes())
    assert header is not None
    assert header.header_bytes <= HEADER_BYTES
    assert spec is not None
    assert spec.num_kv_heads == (2, 0)


@given(length=st.integers(0, 1 << 16))
@settings(max_examples=150, deadline=None)
def test_every_truncation_is_refused(length: int) -> None:
    """A file cut anywhere before its last tensor's end is never taken for a whole one."""
    data = model_bytes()
    assert outcomes(data[: length % len(data)]) == (None, None)


@given(flips=flips, writes=word_writes)
@settings(max_examples=400, deadline=None)
def test_flipped_bytes_give_an_error_or_a_header(
    flips: list[tuple[int, int]], writes: list[tuple[int, int]]
) -> None:
    """Flipped bytes and absurd numbers give a refusal, or a header that stays inside the file."""
    data = bytearray(model_bytes())
    for at, value in flips:
        data[at % len(data)] ^= value
    for at, word in writes:
        start = at % (len(data) - 8)
        data[start : start + 8] = word.to_bytes(8, "little")
    header, spec = outcomes(bytes(data))
    if header is not None:
        assert all(0 <= t.offset <= len(data) - t.size_bytes for t in header.tensors)
        assert sum(t.size_bytes for t in header.tensors) <= len(data)
    if spec is not None:
        assert len(spec.num_kv_heads) == spec.num_layers
        assert spec.weights_bytes <= len(data)


@given(noise=st.binary(max_size=512))
@settings(max_examples=100, deadline=None)
def test_noise_after_the_magic_is_refused(noise: bytes) -> None:
    """Random bytes behind a right beginning never become a model."""
    _, spec = outcomes(b"GGUF\x03\0\0\0" + noise)
    assert spec is None
