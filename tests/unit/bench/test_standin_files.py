"""Stand-in files: what is written is what the blueprint says."""

from pathlib import Path

import gguf
import msgspec
import numpy as np
import pytest

from brim.bench.standin import ARCHITECTURES, Dimensions, blueprint, clone_blueprint, tiny, write
from brim.bench.standin.blocks import random_blocks
from brim.bench.standin.blueprint import Blueprint, Tensor, count_pair, text_pair
from brim.bench.standin.vocabulary import MIN_VOCAB_SIZE, byte_letters, tokenizer_pairs
from brim.errors import InvalidRequest, ModelFileError, Unsupported
from brim.registry.describe import describe_gguf
from brim.registry.gguf_header import read_gguf_header
from brim.registry.sources import DEMO_PATH

SMALL = tiny("llama", num_layers=1, vocab_size=300)

LLAMA_70B = Dimensions(
    architecture="llama", num_layers=80, hidden_size=8192, vocab_size=4096, num_heads=64,
    num_kv_heads=8, head_dim=128, feed_forward_size=28_672,
)  # fmt: skip


def one_tensor(name: str, shape: tuple[int, ...], type_name: str) -> Blueprint:
    return Blueprint(
        (text_pair("general.architecture", "llama"),), (Tensor(name, shape, type_name),)
    )


def test_a_file_holds_the_tensors_of_its_blueprint(tmp_path: Path) -> None:
    """Names, shapes, types, offsets and size, as an independent reader finds them."""
    model = blueprint(SMALL, "Q4_K_M")
    path = write(tmp_path / "model.gguf", model)
    read = gguf.GGUFReader(path)
    assert [(t.name, tuple(t.shape), t.tensor_type.name) for t in read.tensors] == [
        (t.name, t.shape, t.type_name) for t in model.tensors
    ]
    assert path.stat().st_size == model.file_bytes
    assert sum(int(t.n_bytes) for t in read.tensors) == model.weights_bytes


def test_the_same_seed_gives_the_same_file(tmp_path: Path) -> None:
    """Measurements can be repeated on the very weights."""
    model = blueprint(SMALL)
    first, second, other = (
        write(tmp_path / f"{number}.gguf", model, seed=seed).read_bytes()
        for number, seed in enumerate((1, 1, 2))
    )
    assert first == second != other


def test_the_sparse_form_has_the_whole_size_and_takes_no_room(tmp_path: Path) -> None:
    """A 70 B model can be dry-run on a small disk."""
    model = blueprint(LLAMA_70B)
    path = write(tmp_path / "big.gguf", model, with_data=False)
    status = path.stat()
    assert status.st_size == model.file_bytes > 35 * 10**9
    assert status.st_blocks * 512 < 1_000_000
    spec = describe_gguf(path)
    assert (spec.num_layers, spec.weights_bytes) == (80, model.weights_bytes)


def test_a_sparse_file_and_a_whole_one_have_the_same_header(tmp_path: Path) -> None:
    """What a dry run says of one holds for the other."""
    model = blueprint(SMALL)
    sparse = write(tmp_path / "sparse.gguf", model, with_data=False)
    whole = write(tmp_path / "whole.gguf", model)
    assert read_gguf_header(sparse).digest == read_gguf_header(whole).digest
    assert sparse.stat().st_size == whole.stat().st_size


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_template_is_described_as_what_it_was_made_from(
    architecture: str, tmp_path: Path
) -> None:
    """The header says the dimensions and the bytes of the blueprint."""
    dimensions = tiny(architecture)
    model = blueprint(dimensions, "Q8_0")
    spec = describe_gguf(write(tmp_path / "model.gguf", model, with_data=False))
    assert spec.architecture == architecture
    assert spec.num_layers == dimensions.num_layers
    assert spec.vocab_size == dimensions.vocab_size
    assert spec.num_experts == dimensions.num_experts
    assert spec.weights_bytes == model.weights_bytes
    assert spec.quant == "Q8_0"
    attending = [layer for layer in spec.kv_layers if layer.key_width]
    hybrid, mamba = len(dimensions.recurrent_layers), architecture == "mamba"
    assert len(attending) == (0 if mamba else dimensions.num_layers - hybrid)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("blk.0.attn_norm.weight", 0.5, 1.5),
        ("blk.0.attn_q.bias", -0.2, 0.2),
        ("blk.0.ssm_a", -2.0, -0.1),
        ("rope_freqs.weight", 1.0, 1.0),
        ("blk.0.attn_sinks.weight", -0.2, 0.2),
    ],
)
def test_tensors_that_are_no_matrices_get_values_that_suit_them(
    name: str, low: float, high: float, tmp_path: Path
) -> None:
    """A norm of zero, a growing state or a random rope factor would spoil what follows."""
    path = write(tmp_path / "model.gguf", one_tensor(name, (256,), "F32"))
    found = gguf.GGUFReader(path).tensors[0].data
    assert low <= float(found.min()) <= float(found.max()) <= high


def test_a_matrix_is_as_wide_as_its_rows_need(tmp_path: Path) -> None:
    """A product with a row keeps its operand's size, so activations neither vanish nor grow."""
    shape = (4096, 16)
    path = write(tmp_path / "model.gguf", one_tensor("blk.0.ffn_up.weight", shape, "Q8_0"))
    tensor = gguf.GGUFReader(path).tensors[0]
    found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    assert float(found.std()) == pytest.approx(1 / 64, rel=0.05)


def test_a_clone_is_described_as_its_original_is(tmp_path: Path) -> None:
    """Same keys, tensors, types and bytes; the header is the same to the bit."""
    path = write(tmp_path / "demo.gguf", clone_blueprint(DEMO_PATH))
    original, copy = describe_gguf(DEMO_PATH), describe_gguf(path)
    assert copy == msgspec.structs.replace(original, paths=(str(path),))
    assert read_gguf_header(path).digest == read_gguf_header(DEMO_PATH).digest
    assert path.read_bytes() != DEMO_PATH.read_bytes()


def test_a_clone_of_a_split_file_is_one_file(tmp_path: Path) -> None:
    """Tensors of all parts, without the keys that say which part it is."""
    whole = blueprint(SMALL)
    half = len(whole.tensors) // 2
    for number, tensors in enumerate((whole.tensors[:half], whole.tensors[half:])):
        split = (count_pair("split.no", number), count_pair("split.count", 2))
        part = Blueprint(((*whole.pairs, *split) if number == 0 else split), tensors)
        write(tmp_path / f"m-{number + 1:05}-of-00002.gguf", part, with_data=False)
    assert clone_blueprint(tmp_path / "m-00001-of-00002.gguf") == whole


def test_the_vocabulary_has_every_byte_and_distinct_tokens() -> None:
    """Any text can be encoded, and no two tokens are one."""
    pairs = {pair.key: pair for pair in tokenizer_pairs(1000)}
    assert set(pairs) >= {"tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.pre"}
    assert len(set(byte_letters())) == 256
    model = Blueprint(tuple(tokenizer_pairs(1000)), ())
    assert len(model.header()) > 1000 * 8


def test_the_tokens_are_as_many_as_asked_for(tmp_path: Path) -> None:
    """The count decides the width of the output matrix."""
    path = write(tmp_path / "m.gguf", blueprint(tiny("llama", num_layers=1, vocab_size=777)))
    keys = frozenset({"tokenizer.ggml.tokens", "tokenizer.ggml.merges"})
    metadata = read_gguf_header(path, keep=keys).metadata
    tokens, merges = (metadata[key] for key in sorted(keys, reverse=True))
    items, pairs = getattr(tokens, "items", ()), getattr(merges, "items", ())
    assert len(items) == len(set(items)) == 777
    # No merge makes a part of another one: text stays bytes.
    assert not {pair.replace(" ", "") for pair in pairs} & {p.split(" ")[0] for p in pairs}


def test_a_vocabulary_below_the_bytes_is_refused() -> None:
    """The message says the least."""
    with pytest.raises(InvalidRequest, match=f"at least {MIN_VOCAB_SIZE} tokens, not 257"):
        tokenizer_pairs(257)


def test_an_architecture_without_a_template_is_refused_with_the_ways() -> None:
    """A header of any architecture can be cloned instead."""
    with pytest.raises(Unsupported, match="give a GGUF file of it"):
        blueprint(msgspec.structs.replace(SMALL, architecture="unknown"))
    with pytest.raises(Unsupported, match="no template for 'unknown'; there are deepseek2"):
        tiny("unknown")


def test_a_quant_of_mlx_is_refused() -> None:
    """Stand-ins are GGUF files."""
    with pytest.raises(Unsupported, match="MLX 4bit is not GGUF's"):
        blueprint(SMALL, "MLX 4bit")


def test_rows_that_do_not_divide_into_blocks_are_refused() -> None:
    """The message names tensor, length and type."""
    with pytest.raises(ModelFileError, match=r"rows of x.weight have 100 elements, Q4_K takes"):
        one_tensor("x.weight", (100, 2), "Q4_K").header()


def test_memory_stays_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor is made in chunks, however large it is."""
    largest = 0

    def recording(kind: str, number: int, deviation: float, rng: np.random.Generator) -> np.ndarray:
        nonlocal largest
        made = random_blocks(kind, number, deviation, rng)
        largest = max(largest, made.nbytes)
        return made

    monkeypatch.setattr("brim.bench.standin.writer.random_blocks", recording)
    monkeypatch.setattr("brim.bench.standin.writer.CHUNK_BYTES", 4096)
    write(tmp_path / "m.gguf", one_tensor("blk.0.ffn_up.weight", (256, 256), "F16"))
    assert 0 < largest <= 4096
