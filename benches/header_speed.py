"""Times the description of a 40 GB GGUF file from its header: 80 layers, 262,144 tokens, merges.

    python benches/header_speed.py

The file is sparse: it has its whole size and takes the disk space of its header.
"""

import argparse
import os
import statistics
import struct
import tempfile
import time
from pathlib import Path

from brim.registry.describe import describe_gguf

NUM_TOKENS, NUM_MERGES = 262_144, 280_000
NUM_LAYERS, HIDDEN, FEED_FORWARD, KV_WIDTH = 80, 8192, 28672, 1024
Q4_K, Q4_K_BYTES = 12, 144
"""ggml's number of the type, and the bytes of 256 weights."""


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _number(key: str, value: int) -> bytes:
    return _string(key) + struct.pack("<II", 4, value)


def _strings(key: str, items: list[str]) -> bytes:
    head = _string(key) + struct.pack("<IIQ", 9, 8, len(items))
    return head + b"".join(map(_string, items))


def write(path: Path) -> int:
    """Write the file; gives the size of its header."""
    pairs = [
        _string("general.architecture") + struct.pack("<I", 8) + _string("llama"),
        _number("llama.context_length", 131_072),
        _number("llama.embedding_length", HIDDEN),
        _number("llama.block_count", NUM_LAYERS),
        _number("llama.attention.head_count", 64),
        _number("llama.attention.head_count_kv", 8),
        _strings("tokenizer.ggml.tokens", [f"token {n}" for n in range(NUM_TOKENS)]),
        _string("tokenizer.ggml.token_type")
        + struct.pack("<IIQ", 9, 5, NUM_TOKENS)
        + bytes(4 * NUM_TOKENS),
        _strings("tokenizer.ggml.merges", [f"to{n} ken{n}" for n in range(NUM_MERGES)]),
        _number("tokenizer.ggml.eos_token_id", 2),
    ]
    matrices = {
        "attn_q": (HIDDEN, HIDDEN), "attn_k": (HIDDEN, KV_WIDTH), "attn_v": (HIDDEN, KV_WIDTH),
        "attn_output": (HIDDEN, HIDDEN), "ffn_gate": (HIDDEN, FEED_FORWARD),
        "ffn_up": (HIDDEN, FEED_FORWARD), "ffn_down": (FEED_FORWARD, HIDDEN),
    }  # fmt: skip
    shapes = {"token_embd": (HIDDEN, NUM_TOKENS), "output": (HIDDEN, NUM_TOKENS)} | {
        f"blk.{layer}.{name}": shape
        for layer in range(NUM_LAYERS)
        for name, shape in matrices.items()
    }
    infos, offset = b"", 0
    for name, (row, rows) in shapes.items():
        infos += _string(f"{name}.weight") + struct.pack("<IQQIQ", 2, row, rows, Q4_K, offset)
        offset += row * rows // 256 * Q4_K_BYTES
    header = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(pairs)) + b"".join(pairs) + infos
    header += bytes(-len(header) % 32)
    path.write_bytes(header)
    os.truncate(path, len(header) + offset)
    return len(header)


def main() -> None:
    """Describe the file several times and print the median."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "big.gguf"
        header_bytes = write(path)
        times_s = []
        for _ in range(options.runs):
            began = time.perf_counter()
            spec = describe_gguf(path)
            times_s.append(time.perf_counter() - began)
    median_ms, most_ms = 1e3 * statistics.median(times_s), 1e3 * max(times_s)
    print(
        f"{spec.weights_bytes / 1e9:.1f} GB with a header of {header_bytes / 1e6:.1f} MB: "
        f"{median_ms:.1f} ms, at most {most_ms:.1f} ms"
    )


if __name__ == "__main__":
    main()
