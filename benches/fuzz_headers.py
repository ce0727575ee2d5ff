"""Damages headers in many ways and reads them: each must end in a description or in a BrimError.

    python benches/fuzz_headers.py                      # 100,000 headers, about three minutes
    python benches/fuzz_headers.py --count 5000 --start 20000

Case n is the same whenever it is run.  Memory is bounded while it runs: the address space may grow
by 256 MB over what the imports took, and a MemoryError counts as a failure; so does any exception
that is no BrimError, and a case that takes over ten seconds.
"""

import argparse
import functools
import json
import random
import resource
import signal
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec

from brim.core.model import ModelSpec
from brim.errors import BrimError
from brim.registry.gguf_header import parse_gguf_header
from brim.registry.sources import describe

MAX_GROWTH_BYTES = 256 << 20
"""What a header may make the process allocate."""

MAX_CASE_S = 10
"""A case that takes longer counts as hanging; the slowest seen took under 0.1 s."""

Files = dict[str, bytes]
"""A model's files by name; the first is the one that is named."""

WORDS = (
    0,
    1,
    2,
    255,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
)

VALUES: tuple[Any, ...] = (
    0, -1, 1, 2, 7, 1023, 1025, 2**24, 2**24 + 1, 2**31, 2**63, 10**30, 1.5, -0.5, float("inf"),
    float("nan"), None, True, "", "x", "auto", [], [0], [1] * 2000, ["full_attention"], {},
    {"a": 1},
)  # fmt: skip
"""What a JSON value is replaced by."""


# --- undamaged files ---------------------------------------------------------------------------


def _string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _pair(key: str, value: Any) -> bytes:
    head = _string(key.encode())
    if isinstance(value, int):
        return head + struct.pack("<II", 4, value)
    if isinstance(value, str):
        return head + struct.pack("<I", 8) + _string(value.encode())
    if isinstance(value[0], str):
        items = b"".join(_string(item.encode()) for item in value)
        return head + struct.pack("<IIQ", 9, 8, len(value)) + items
    return head + struct.pack(f"<IIQ{len(value)}I", 9, 4, len(value), *value)


def gguf(version: int, pairs: dict[str, Any], tensors: list[tuple[str, tuple[int, ...]]]) -> bytes:
    """A GGUF file of F32 tensors."""
    out = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(pairs))
    out += b"".join(_pair(key, value) for key, value in pairs.items())
    offset = 0
    for name, shape in tensors:
        out += _string(name.encode()) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        out += struct.pack("<IQ", 0, offset)
        size = 4
        for side in shape:
            size *= side
        offset += -(-size // 32) * 32
    return out + bytes(-len(out) % 32) + bytes(offset)


def _gguf_pairs(**more: Any) -> dict[str, Any]:
    return {
        "general.architecture": "gemma3", "gemma3.context_length": 512,
        "gemma3.embedding_length": 16, "gemma3.block_count": 3,
        "gemma3.attention.head_count": 4, "gemma3.attention.head_count_kv": [2, 0, 2],
        "gemma3.attention.sliding_window": 64, "gemma3.attention.sliding_window_pattern": [1, 0, 1],
        "gemma3.attention.key_length": 4, "gemma3.full_attention_interval": 2,
        "gemma3.expert_count": 4, "gemma3.expert_used_count": 2,
        "gemma3.ssm.conv_kernel": 4, "gemma3.nextn_predict_layers": 1,
        "gemma3.ssm.inner_size": 8, "gemma3.ssm.state_size": 4,
        "tokenizer.ggml.tokens": [f"token{n}" for n in range(1100)],
        "tokenizer.ggml.token_type": list(range(1100)), "tokenizer.chat_template": "{{ messages }}",
        **more,
    }  # fmt: skip


GGUF_TENSORS = [
    ("token_embd.weight", (16, 1100)), ("output_norm.weight", (16,)),
    ("blk.0.attn_q.weight", (16, 16)), ("blk.1.ssm_in.weight", (16, 8)),
    ("blk.2.ffn_down_exps.weight", (16, 8, 4)),
]  # fmt: skip


def safetensors(shapes: dict[str, tuple[int, ...]], dtype: str = "BF16", size: int = 2) -> bytes:
    """A safetensors file of zeros."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        num_bytes = size
        for side in shape:
            num_bytes *= side
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + num_bytes]}
        at += num_bytes
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(at)


CONFIGS: list[dict[str, Any]] = [
    {"model_type": "qwen3_moe", "hidden_size": 64, "num_hidden_layers": 4,
     "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 128,
     "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2, "vocab_size": 512,
     "max_position_embeddings": 1024, "mlp_only_layers": [1], "decoder_sparse_step": 1},
    {"model_type": "deepseek_v3", "hidden_size": 64, "num_hidden_layers": 3,
     "num_attention_heads": 4, "kv_lora_rank": 32, "q_lora_rank": 16, "qk_rope_head_dim": 8,
     "qk_nope_head_dim": 16, "v_head_dim": 16, "intermediate_size": 128, "vocab_size": 512,
     "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
     "n_shared_experts": 1, "first_k_dense_replace": 1},
    {"model_type": "gemma4", "text_config": {
        "model_type": "gemma4_text", "hidden_size": 64, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 32,
        "intermediate_size": 128, "vocab_size": 512, "sliding_window": 64,
        "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 16, "use_double_wide_mlp": True,
        "layer_types": ["sliding_attention", "full_attention"] * 2}},
    {"model_type": "granitemoehybrid", "hidden_size": 64, "num_hidden_layers": 3,
     "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64,
     "shared_intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2,
     "layer_types": ["mamba", "attention", "mamba"], "mamba_n_heads": 4, "mamba_d_head": 16,
     "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_d_conv": 4, "vocab_size": 512},
    {"model_type": "lfm2", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
     "num_key_value_heads": 2, "block_ff_dim": 96, "full_attn_idxs": [1], "conv_L_cache": 3,
     "vocab_size": 512},
]  # fmt: skip


def _dense_config() -> bytes:
    config = {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
        "intermediate_size": 128, "vocab_size": 32,
        "quantization": {"bits": 4, "group_size": 64, "lm_head": {"group_size": 32, "bits": 8}},
    }  # fmt: skip
    return json.dumps(config).encode()


def _index(parts: dict[str, list[str]]) -> bytes:
    weight_map = {name: part for part, names in parts.items() for name in names}
    return json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}).encode()


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@functools.cache
def kinds() -> dict[str, Files]:
    """The undamaged files of each kind."""
    split = {"split.count": 2, "split.tensors.count": len(GGUF_TENSORS)}
    parts = [
        gguf(3, _gguf_pairs(**split, **{"split.no": 0}), GGUF_TENSORS[:2]),
        gguf(3, {**split, "split.no": 1}, GGUF_TENSORS[2:]),
    ]
    return {
        "gguf v3": {"model.gguf": gguf(3, _gguf_pairs(), GGUF_TENSORS)},
        "gguf v2": {"model.gguf": gguf(2, _gguf_pairs(), GGUF_TENSORS)},
        "gguf split": {f"m-0000{n}-of-00002.gguf": part for n, part in enumerate(parts, start=1)},
        "safetensors": {
            "model.safetensors": safetensors({EMBEDDING: (32, 64), HEAD: (32, 64)}),
            "config.json": _dense_config(),
        },
        "safetensors sharded": {
            "model.safetensors.index.json": _index({ONE: [EMBEDDING], TWO: [HEAD]}),
            ONE: safetensors({EMBEDDING: (32, 64)}),
            TWO: safetensors({HEAD: (32, 64)}),
            "config.json": _dense_config(),
        },
        "config.json": {"config.json": b""},
    }


# --- damage ------------------------------------------------------------------------------------


def damage_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flipped bits, words that are too large, cuts and repeats, half of them in the first bytes."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        if len(changed) < 16:
            break
        at = rng.randrange(min(len(changed), rng.choice((64, 1024, 1 << 20))))
        act = rng.randrange(6)
        if act < 2:
            changed[at] ^= 1 << rng.randrange(8)
        elif act == 2:
            changed[at] = rng.randrange(256)
        elif act == 3:
            size = rng.choice((4, 8))
            word = rng.choice(WORDS) & (256**size - 1)
            changed[at : at + size] = word.to_bytes(size, "little")
        elif act == 4:
            del changed[at : at + rng.choice((1, 4, 8, 100, 1 << 20))]
        else:
            changed[at:at] = changed[at : at + rng.choice((1, 8, 64))] * rng.choice((1, 3))
    return bytes(changed)


def damage_json(value: Any, rng: random.Random) -> Any:
    """One value, somewhere in it, gone or replaced."""
    if isinstance(value, dict) and value and rng.random() < 0.95:
        key = rng.choice(sorted(value))
        act = rng.random()
        if act < 0.15:
            return {k: v for k, v in value.items() if k != key}
        if act < 0.25:
            return {**value, rng.choice(sorted(value)) + "x": value[key]}
        return {**value, key: damage_json(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], damage_json(value[at], rng), *value[at + 1 :]]
    return rng.choice(VALUES)


def _damage_config(rng: random.Random) -> bytes:
    config = rng.choice(CONFIGS)
    for _ in range(rng.choice((1, 1, 2, 3))):
        config = damage_json(config, rng)
        if not isinstance(config, dict):
            break
    text = json.dumps(config).encode()
    return damage_bytes(text, rng) if rng.random() < 0.1 else text


def _damage_header(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose header is damaged as JSON and is JSON still."""
    length = int.from_bytes(data[:8], "little")
    text = json.dumps(damage_json(json.loads(data[8 : 8 + length]), rng)).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def damaged(kind: str, files: Files, rng: random.Random) -> Files:
    """The files of one case."""
    if kind == "config.json":
        return {"config.json": _damage_config(rng)}
    victim = rng.choice([name for name in files if not name.endswith("config.json")] * 4 + [*files])
    data = files[victim]
    if victim.endswith(".json") and rng.random() < 0.7:
        data = json.dumps(damage_json(json.loads(data), rng)).encode()
    elif victim.endswith(".safetensors") and rng.random() < 0.5:
        data = _damage_header(data, rng)
    else:
        data = damage_bytes(data, rng)
    return {**files, victim: data}


# --- running -----------------------------------------------------------------------------------


def read(kind: str, files: Files, directory: Path) -> ModelSpec:
    """Describe the model in files written to a directory, which is left empty again."""
    try:
        for name, data in files.items():
            (directory / name).write_bytes(data)
        first = next(iter(files))
        if kind.startswith("gguf"):
            data = files[first]
            parse_gguf_header(first, data[: len(data) // 2], len(data))
            return describe(str(directory / first))
        if kind == "config.json":
            return describe(str(directory / first), quant="Q4_K_M", name="x")
        return describe(str(directory))
    finally:
        for path in directory.iterdir():
            path.unlink()


def outcome(number: int, directory: Path) -> tuple[str, str]:
    """The kind of case `number`, and 'described' or 'refused'.

    Raises:
        Exception: Whatever is no BrimError: the failure that is looked for.
    """
    rng = random.Random(number)
    all_kinds = kinds()
    kind = list(all_kinds)[number % len(all_kinds)]
    try:
        spec = read(kind, damaged(kind, all_kinds[kind], rng), directory)
    except BrimError as exc:
        if not 10 < len(exc.message) < 2_000 or "\n" in exc.message:
            raise AssertionError(f"case {number}: {exc.message!r:.200} is no sentence") from exc
        return kind, "refused"
    # A description goes through a socket and into JSON.
    if msgspec.msgpack.decode(msgspec.msgpack.encode(spec), type=ModelSpec) != spec:
        raise AssertionError(f"case {number}: {spec} does not survive encoding")
    if spec.weights_bytes < 0 or len(spec.kv_layers) != spec.num_layers:
        raise AssertionError(f"case {number}: {spec} contradicts itself")
    return kind, "described"


def run(
    numbers: range, directory: Path, each: Callable[[int], None] = lambda number: None
) -> Iterator[tuple[str, str, float]]:
    """Kind, outcome and seconds of each case."""
    for number in numbers:
        each(number)
        began = time.perf_counter()
        kind, result = outcome(number, directory)
        yield kind, result, time.perf_counter() - began


def _address_space_bytes() -> int:
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[0]) * resource.getpagesize() if pages.exists() else 0


def main() -> None:
    """Run the cases that were asked for and print what became of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--start", type=int, default=0)
    options = parser.parse_args()
    counts, slowest = Counter[tuple[str, str]](), 0.0
    current = [0]

    def too_long(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"case {current[0]} takes over {MAX_CASE_S} s")

    def each(number: int) -> None:
        current[0] = number
        signal.setitimer(signal.ITIMER_REAL, MAX_CASE_S)

    with tempfile.TemporaryDirectory() as directory:
        list(run(range(12), Path(directory)))  # imports what is imported late
        before_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if limit := _address_space_bytes():
            limit += MAX_GROWTH_BYTES
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        signal.signal(signal.SIGALRM, too_long)
        numbers = range(options.start, options.start + options.count)
        for kind, result, seconds in run(numbers, Path(directory), each):
            counts[kind, result] += 1
            slowest = max(slowest, seconds)
        signal.setitimer(signal.ITIMER_REAL, 0)
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for kind, result in sorted(counts):
        print(f"{kind:20} {result:10} {counts[kind, result]:7}")
    print(f"{sum(counts.values())} headers, no crash; slowest {1e3 * slowest:.0f} ms; "
          f"memory grew by {(peak_bytes - before_bytes) / 2**20:.0f} MB at most")  # fmt: skip


if __name__ == "__main__":
    main()
