"""Makes a random-weight Llama model with real dimensions: a GGUF file, or a directory for MLX.

Speed depends on a model's shape and quantisation, not on what it has learned, so a stand-in lets
the benches run without a download.  `--trained-like` makes a small model for equality tests
instead: its weights have a decaying spectrum and its logits the skew of a trained model's, so that
near ties are as rare as in real use and exact ties (repeated rows) do not occur.

    python benches/make_standin.py                        # 1.24 B parameters, Q4_K_M, in the cache
    python benches/make_standin.py OUT.gguf --params 3e8 --quant Q8_0
    python benches/make_standin.py OUT.gguf --trained-like --quant F16
    python benches/make_standin.py --quant "MLX bf16"     # 113 M parameters, in the cache

The same options and seed give the same weights on the same numpy.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import platformdirs

from brim.bench.standin import Blueprint, blueprint, write
from brim.bench.standin.blueprint import (
    Pair,
    Tensor,
    count_pair,
    counts_pair,
    flag_pair,
    text_pair,
    texts_pair,
)
from brim.bench.standin.checkpoint import checkpoint, write_checkpoint
from brim.bench.standin.keys import metadata_pairs
from brim.bench.standin.trained import LLAMA_1B, SMALL, Shape, logit_spread, tensors
from brim.bench.standin.vocabulary import filler_words
from brim.registry.quants import MlxQuant, parse_quant

__all__ = [
    "LLAMA_1B", "LLAMA_113M", "SMALL", "TOKENIZER", "Shape", "default_path", "filler_words",
    "logit_spread", "mlx_path", "tensors", "vocabulary", "write_f16",
]  # fmt: skip

TOKENIZER = Path(__file__).parent.parent / "tests" / "models" / "pystd-1m"

LLAMA_113M = Shape(
    num_layers=14,
    hidden=768,
    num_heads=12,
    num_kv_heads=4,
    head_dim=64,
    feed_forward=2048,
    vocab_size=32_000,
    context_tokens=8192,
)
"""For MLX on a CPU, which reads about 30 tokens a second with it; smaller ones measure Python."""


def default_path(directory: Path | None = None) -> Path:
    """Where the 1 B stand-in is kept between runs."""
    base = directory or Path(platformdirs.user_cache_dir("brim")) / "bench"
    return base / "standin-1b-q4_k_m.gguf"


def mlx_path(directory: Path | None = None, quant: str = "MLX bf16") -> Path:
    """Where the stand-in for MLX is kept between runs, a directory."""
    name = f"standin-113m-{quant.lower().replace(' ', '-')}"
    return default_path(directory).with_name(name)


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


def tokenizer_pairs(directory: Path, size: int) -> list[Pair]:
    """Tokenizer and chat template of a folder in Hugging Face's form."""
    source = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokens, types = vocabulary(source, size)
    merges = source["model"]["merges"]
    return [
        text_pair("tokenizer.ggml.model", "gpt2"),
        text_pair("tokenizer.ggml.pre", "gpt-2"),
        texts_pair("tokenizer.ggml.tokens", tokens),
        counts_pair("tokenizer.ggml.token_type", types),
        texts_pair(
            "tokenizer.ggml.merges", [m if isinstance(m, str) else " ".join(m) for m in merges]
        ),
        count_pair("tokenizer.ggml.bos_token_id", tokens.index(config["bos_token"])),
        count_pair("tokenizer.ggml.eos_token_id", tokens.index(config["eos_token"])),
        flag_pair("tokenizer.ggml.add_bos_token", False),
        text_pair("tokenizer.chat_template", config["chat_template"]),
    ]


def with_tokenizer(pairs: list[Pair], tokenizer: Path, size: int) -> tuple[Pair, ...]:
    """The pairs with a real tokenizer instead of the synthetic one."""
    kept = (pair for pair in pairs if not pair.key.startswith("tokenizer."))
    return (*kept, *tokenizer_pairs(tokenizer, size))


# --- files -------------------------------------------------------------------------------------


def write_plain(out: Path, shape: Shape, tokenizer: Path, *, seed: int, quant: str) -> None:
    """Write random blocks of the quant's types: as fast as the disk."""
    plain = blueprint(shape.dimensions, quant)
    pairs = with_tokenizer(list(plain.pairs), tokenizer, shape.vocab_size)
    write(out, Blueprint(pairs, plain.tensors), seed=seed)


def write_f16(out: Path, shape: Shape, tokenizer: Path, *, seed: int, trained_like: bool) -> None:
    """Write the model as F16 (norms as F32), one tensor in memory at a time."""
    plan = list(tensors(shape, np.random.default_rng(seed), trained_like=trained_like))
    pairs = list(metadata_pairs(shape.dimensions, "F16"))
    model = Blueprint(
        with_tokenizer(pairs, tokenizer, shape.vocab_size),
        tuple(
            Tensor(name, dims[::-1], "F32" if len(dims) == 1 else "F16") for name, dims, _ in plan
        ),
    )
    with out.open("wb") as file:
        file.write(model.header())
        for number, (tensor, (name, _, make)) in enumerate(
            zip(model.tensors, plan, strict=True), 1
        ):
            print(f"\r{number}/{len(plan)} {name:28}", end="", file=sys.stderr, flush=True)
            file.write(make().astype("<f4" if tensor.type_name == "F32" else "<f2").data)
            file.write(bytes(model.padded(tensor.size_bytes) - tensor.size_bytes))
    print(file=sys.stderr)


def quantise(source: Path, out: Path, quant: str, num_threads: int) -> None:
    """Quantise with llama.cpp's own recipes, so that the mixture of types is the real one."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{quant}")
    params.nthread = num_threads
    if llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(out), params) != 0:
        raise SystemExit(f"llama.cpp could not quantise to {quant}; see its message above")


def make_directory(out: Path, shape: Shape, quant: str, seed: int) -> None:
    """Write a checkpoint beside `out` and move it into place; one that is there is replaced."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".standin-") as scratch:
        done = write_checkpoint(
            Path(scratch) / "done", checkpoint(shape.dimensions, quant), seed=seed
        )
        shutil.rmtree(out, ignore_errors=True)
        done.replace(out)


def make(out: Path, shape: Shape, tokenizer: Path, args: argparse.Namespace) -> None:
    """Write, quantise and move into place, so that `out` is never half a model."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".standin-") as scratch:
        f16, done = Path(scratch) / "f16.gguf", Path(scratch) / "quantised.gguf"
        if not args.trained_like:
            write_plain(done, shape, tokenizer, seed=args.seed, quant=args.quant)
        else:
            write_f16(f16, shape, tokenizer, seed=args.seed, trained_like=True)
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
    parser.add_argument(
        "--quant", default="Q4_K_M", type=str.upper, help="as F16, Q4_K_M, 'MLX bf16'"
    )
    parser.add_argument("--trained-like", action="store_true", help="small, for equality tests")
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--force", action="store_true", help="make it again if it is there")
    return parser.parse_args()


def main() -> None:
    """Make the file unless it is there, and print its path on standard output."""
    args = parse()
    is_mlx = isinstance(parse_quant(args.quant), MlxQuant)
    if is_mlx and args.trained_like:
        raise SystemExit("--trained-like makes GGUF files; leave it out or name a quant of GGUF")
    shape = SMALL if args.trained_like else LLAMA_113M if is_mlx else LLAMA_1B
    if args.vocab:
        shape = replace(shape, vocab_size=args.vocab)
    if args.params:
        shape = shape.scaled_to(args.params)
    if args.out is None and (args.params or args.vocab):
        raise SystemExit("a stand-in of another size needs a name of its own; give OUT")
    out = args.out or (mlx_path(args.dir, args.quant) if is_mlx else default_path(args.dir))
    if args.force or not out.exists():
        print(f"{shape.parameters / 1e9:.3f} B parameters", file=sys.stderr)
        if is_mlx:
            make_directory(out, shape, args.quant, args.seed)
        else:
            make(out, shape, args.tokenizer, args)
    print(out)


if __name__ == "__main__":
    main()
