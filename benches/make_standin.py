"""Makes a random-weight Llama model with real dimensions and a real tokenizer, as a GGUF file.

Speed depends on a model's shape and quantisation, not on what it has learned, so a stand-in lets
the benches run without a download.  `--trained-like` makes a small model for equality tests
instead: its weights have a decaying spectrum and its logits the skew of a trained model's, so that
near ties are as rare as in real use and exact ties (repeated rows) do not occur.

    python benches/make_standin.py                        # 1.24 B parameters, Q4_K_M, in the cache
    python benches/make_standin.py OUT.gguf --params 3e8 --quant Q8_0
    python benches/make_standin.py OUT.gguf --trained-like --quant F16

The same options and seed give the same weights on the same numpy.
"""

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import platformdirs

Matrix = npt.NDArray[np.float32]

TOKENIZER = Path(__file__).parent.parent / "tests" / "models" / "pystd-1m"

TRAINED_PERPLEXITY = 10.0
"""What a small trained model reaches on text like its own; sets the spread of the logits."""


@dataclass(frozen=True)
class Shape:
    """Dimensions of a Llama model; the head is tied to the token embeddings unless `untied`."""

    num_layers: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    feed_forward: int
    vocab_size: int
    context_tokens: int
    untied: bool = False

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer, norms included."""
        attention = 2 * self.hidden * self.head_dim * (self.num_heads + self.num_kv_heads)
        return attention + 3 * self.hidden * self.feed_forward + 2 * self.hidden

    @property
    def parameters(self) -> int:
        """Parameters of the whole model."""
        embeddings = self.vocab_size * self.hidden * (2 if self.untied else 1)
        return embeddings + self.num_layers * self.layer_parameters + self.hidden

    def scaled_to(self, parameters: float) -> "Shape":
        """The same widths with as many layers as bring it nearest to `parameters`."""
        rest = replace(self, num_layers=0).parameters
        return replace(self, num_layers=max(1, round((parameters - rest) / self.layer_parameters)))


LLAMA_1B = Shape(
    num_layers=16,
    hidden=2048,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    feed_forward=8192,
    vocab_size=128_256,
    context_tokens=131_072,
)
"""Llama-3.2-1B's dimensions: the smallest model that people chat with."""

SMALL = Shape(
    num_layers=4,
    hidden=256,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    feed_forward=768,
    vocab_size=4096,
    context_tokens=8192,
    untied=True,
)
"""Divisible by 256, so that K-quants apply, and small enough for a test to load in milliseconds."""


def default_path(directory: Path | None = None) -> Path:
    """Where the 1 B stand-in is kept between runs."""
    base = directory or Path(platformdirs.user_cache_dir("brim")) / "bench"
    return base / "standin-1b-q4_k_m.gguf"


# --- tokenizer ---------------------------------------------------------------------------------


def vocabulary(source: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Token texts and types by id, filled up to `size` with words that no merge ever makes."""
    ids: dict[str, int] = source["model"]["vocab"]
    special = {token["content"]: token["id"] for token in source["added_tokens"]}
    tokens = [text for text, _ in sorted((ids | special).items(), key=lambda item: item[1])]
    if len(tokens) > size:
        raise SystemExit(f"the tokenizer has {len(tokens)} tokens, the model only {size}")
    control, normal = gguf.TokenType.CONTROL.value, gguf.TokenType.NORMAL.value
    types = [control if text in special else normal for text in tokens]
    known = set(tokens)
    words = (word for word in filler_words() if word not in known)
    while len(tokens) < size:
        tokens.append(next(words))
        types.append(normal)
    return tokens, types


def filler_words() -> Iterator[str]:
    """Distinct words with a leading space, as the byte-level alphabet writes it, of 5 letters."""
    number = 0
    while True:
        letters = (chr(ord("a") + number // 26**place % 26) for place in range(5))
        yield "\u0120" + "".join(letters)
        number += 1


def add_tokenizer(writer: gguf.GGUFWriter, directory: Path, size: int) -> None:
    """Copy tokenizer and chat template from a folder in Hugging Face's form."""
    source = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokens, types = vocabulary(source, size)
    merges = source["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(tokens.index(config["bos_token"]))
    writer.add_eos_token_id(tokens.index(config["eos_token"]))
    writer.add_add_bos_token(False)
    writer.add_chat_template(config["chat_template"])


# --- weights -----------------------------------------------------------------------------------

Draw = Callable[[int, int, float], Matrix]
"""(rows, columns, gain) -> weights whose product with a unit-variance vector has variance gain²."""


def plain_draw(rng: np.random.Generator) -> Draw:
    """Independent normal weights: all that a speed measurement needs."""

    def draw(rows: int, columns: int, gain: float) -> Matrix:
        weights = rng.standard_normal((rows, columns), dtype=np.float32)
        return weights * np.float32(gain / math.sqrt(columns))

    return draw


def spectrum_draw(rng: np.random.Generator) -> Draw:
    """Weights with singular values that decay as k^-1/2 over a flat floor, like trained ones.

    The floor keeps every row distinct and the matrix of full rank.
    """

    def draw(rows: int, columns: int, gain: float) -> Matrix:
        rank = min(rows, columns) // 2
        decay = np.arange(1, rank + 1, dtype=np.float32) ** -0.5
        left = rng.standard_normal((rows, rank), dtype=np.float32)
        right = rng.standard_normal((rank, columns), dtype=np.float32)
        floor = rng.standard_normal((rows, columns), dtype=np.float32)
        shaped = np.asarray((left * decay) @ right, dtype=np.float32)
        weights = shaped / shaped.std() + floor
        scale = gain / (math.sqrt(columns) * weights.std())
        return np.asarray(weights * scale, dtype=np.float32)

    return draw


def tensors(
    shape: Shape, rng: np.random.Generator, *, trained_like: bool
) -> Iterator[tuple[str, tuple[int, ...], Callable[[], Matrix]]]:
    """Name, shape (rows, columns) and a maker of every tensor, in the file's order."""
    draw = spectrum_draw(rng) if trained_like else plain_draw(rng)
    width, queries = shape.hidden, shape.num_heads * shape.head_dim
    keys, inner = shape.num_kv_heads * shape.head_dim, shape.feed_forward

    def matrix(rows: int, columns: int, gain: float = 1.0) -> Callable[[], Matrix]:
        return lambda: draw(rows, columns, gain)

    def norm() -> Matrix:
        deviation = rng.standard_normal(width, dtype=np.float32)
        return np.asarray(1 + 0.05 * deviation, dtype=np.float32)

    # Each layer adds two terms to the residual stream; with this gain the embedding stays visible
    # at the end, and with the sharper queries attention looks at few positions, as when trained.
    residual = 1 / math.sqrt(2 * shape.num_layers)
    sharp = 1.5 if trained_like else 1.0
    # Embeddings get unit variance in an element; the tied head of the plain model divides it away.
    embedding = math.sqrt(width) if trained_like else 1.0
    yield "token_embd.weight", (shape.vocab_size, width), matrix(shape.vocab_size, width, embedding)
    for layer in range(shape.num_layers):
        pre = f"blk.{layer}."
        yield pre + "attn_norm.weight", (width,), norm
        yield pre + "attn_q.weight", (queries, width), matrix(queries, width, sharp)
        yield pre + "attn_k.weight", (keys, width), matrix(keys, width, sharp)
        yield pre + "attn_v.weight", (keys, width), matrix(keys, width)
        yield pre + "attn_output.weight", (width, queries), matrix(width, queries, residual)
        yield pre + "ffn_norm.weight", (width,), norm
        yield pre + "ffn_gate.weight", (inner, width), matrix(inner, width)
        yield pre + "ffn_up.weight", (inner, width), matrix(inner, width)
        yield pre + "ffn_down.weight", (width, inner), matrix(width, inner, residual)
    yield "output_norm.weight", (width,), norm
    if shape.untied:
        yield (
            "output.weight",
            (shape.vocab_size, width),
            matrix(shape.vocab_size, width, logit_spread(shape.vocab_size)),
        )


def logit_spread(vocab_size: int) -> float:
    """Standard deviation of normal logits whose softmax has TRAINED_PERPLEXITY, on average.

    Found by halving on drawn logits: ln V - s²/2, the textbook's entropy, holds for a vocabulary
    without end and is far off for a few thousand tokens.
    """
    logits = np.random.default_rng(0).standard_normal((32, vocab_size))
    low, high = 0.0, 2 * math.sqrt(2 * math.log(vocab_size))
    for _ in range(20):
        middle = (low + high) / 2
        weights = np.exp(middle * (logits - logits.max(axis=1, keepdims=True)))
        chances = weights / weights.sum(axis=1, keepdims=True)
        entropy = -np.sum(chances * np.log(chances + 1e-300), axis=1).mean()
        low, high = (middle, high) if entropy > math.log(TRAINED_PERPLEXITY) else (low, middle)
    return low


# --- files -------------------------------------------------------------------------------------


def write_f16(out: Path, shape: Shape, tokenizer: Path, *, seed: int, trained_like: bool) -> None:
    """Write the model as F16 (norms as F32), one tensor in memory at a time."""
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_name("stand-in")
    writer.add_context_length(shape.context_tokens)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.num_layers)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(500_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    add_tokenizer(writer, tokenizer, shape.vocab_size)
    plan = list(tensors(shape, np.random.default_rng(seed), trained_like=trained_like))
    for name, dims, _ in plan:
        dtype = np.dtype(np.float32 if len(dims) == 1 else np.float16)
        writer.add_tensor_info(name, dims, dtype, math.prod(dims) * dtype.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for number, (name, dims, make) in enumerate(plan, 1):
        print(f"\r{number}/{len(plan)} {name:28}", end="", file=sys.stderr, flush=True)
        writer.write_tensor_data(make().astype(np.float32 if len(dims) == 1 else np.float16))
    print(file=sys.stderr)
    writer.close()


def quantise(source: Path, out: Path, quant: str, num_threads: int) -> None:
    """Quantise with llama.cpp's own recipes, so that the mixture of types is the real one."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{quant}")
    params.nthread = num_threads
    if llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(out), params) != 0:
        raise SystemExit(f"llama.cpp could not quantise to {quant}; see its message above")


def make(out: Path, shape: Shape, tokenizer: Path, args: argparse.Namespace) -> None:
    """Write, quantise and move into place, so that `out` is never half a model."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".standin-") as scratch:
        f16, done = Path(scratch) / "f16.gguf", Path(scratch) / "quantised.gguf"
        write_f16(f16, shape, tokenizer, seed=args.seed, trained_like=args.trained_like)
        if args.quant == "F16":
            done = f16
        else:
            quantise(f16, done, args.quant, args.threads)
        done.replace(out)


def parse() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", nargs="?", type=Path, help="file to write (default: the cache)")
    parser.add_argument("--dir", type=Path, help="cache directory, where OUT is not given")
    parser.add_argument("--params", type=float, help="nearest number of parameters, as 1.2e9")
    parser.add_argument("--vocab", type=int, help="tokens in the vocabulary, padded with fillers")
    parser.add_argument("--quant", default="Q4_K_M", type=str.upper, help="F16 or llama.cpp's name")
    parser.add_argument("--trained-like", action="store_true", help="small, for equality tests")
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--force", action="store_true", help="make it again if it is there")
    return parser.parse_args()


def main() -> None:
    """Make the file unless it is there, and print its path on standard output."""
    args = parse()
    shape = SMALL if args.trained_like else LLAMA_1B
    if args.vocab:
        shape = replace(shape, vocab_size=args.vocab)
    if args.params:
        shape = shape.scaled_to(args.params)
    out = args.out or default_path(args.dir)
    if args.force or not out.exists():
        print(f"{shape.parameters / 1e9:.3f} B parameters", file=sys.stderr)
        make(out, shape, args.tokenizer, args)
    print(out)


if __name__ == "__main__":
    main()
