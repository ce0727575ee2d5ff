"""Stand-ins as safetensors checkpoints, in the form that MLX loads: plain bf16, or packed.

The dense and the expert models of the Llama line have a form here; tensors come from the same
templates as the GGUF files' and get the names that checkpoints have.  The same dimensions, quant
and seed give the same files on the same numpy.
"""

import json
import math
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from brim.bench.standin.blocks import random_blocks
from brim.bench.standin.dimensions import Dimensions
from brim.bench.standin.templates import shapes
from brim.bench.standin.vocabulary import tokenizer_config, tokenizer_json
from brim.bench.standin.writer import CHUNK_BYTES, Progress
from brim.errors import InvalidRequest, Unsupported
from brim.registry.quants import ROUTER, MlxQuant, parse_quant
from brim.registry.safetensors_header import DTYPE_BITS, SINGLE

DEFAULT_QUANT = "MLX 4bit"
"""What most people load of MLX, as Q4_K_M is of GGUF."""

_CLASSES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "qwen3moe": ("qwen3_moe", "Qwen3MoeForCausalLM"),
}
"""GGUF's name -> `model_type` and class in config.json."""

ARCHITECTURES = tuple(_CLASSES)
"""GGUF's names of the architectures that have a checkpoint form."""

_OUTER = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
}  # fmt: skip

_INNER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate", "ffn_gate_exps": "mlp.switch_mlp.gate_proj",
    "ffn_up_exps": "mlp.switch_mlp.up_proj", "ffn_down_exps": "mlp.switch_mlp.down_proj",
}  # fmt: skip
"""GGUF's names of modules, and MLX's."""

_TENSOR = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")

NORM_SPREAD, BIAS_SPREAD = 0.05, 0.02
"""Deviations of norms around one and of biases around zero, as in GGUF stand-ins."""


class StoredTensor(msgspec.Struct, frozen=True):
    """One array of the file to be."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    """Rows first, as checkpoints count."""
    value: float | None = None
    """Every element, for scales and offsets of packed matrices; None where they are random."""

    @property
    def size_bytes(self) -> int:
        """In the file."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


class Checkpoint(msgspec.Struct, frozen=True):
    """A model directory to be: its config, and its arrays in the file's order."""

    config: dict[str, Any]
    tensors: tuple[StoredTensor, ...]

    @property
    def weights_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(tensor.size_bytes for tensor in self.tensors)

    def header(self) -> bytes:
        """What stands before the arrays: its length, then JSON padded to a multiple of eight."""
        entries: dict[str, object] = {"__metadata__": {"format": "mlx"}}
        offset = 0
        for tensor in self.tensors:
            end = offset + tensor.size_bytes
            entries[tensor.name] = {
                "dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, end],
            }  # fmt: skip
            offset = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text


class CheckpointModel(msgspec.Struct, frozen=True):
    """What a checkpoint is made of: it can be shortened before it is laid out."""

    dimensions: Dimensions
    quant: str

    def checkpoint(self) -> Checkpoint:
        """The directory; see `checkpoint` for what it raises."""
        return checkpoint(self.dimensions, self.quant)

    def sliced(self, depth: int) -> "CheckpointModel":
        """The same model with `depth` layers, which are all alike."""
        shorter = msgspec.structs.replace(self.dimensions, num_layers=depth)
        return msgspec.structs.replace(self, dimensions=shorter)


def checkpoint(dimensions: Dimensions, quant: str = DEFAULT_QUANT) -> Checkpoint:
    """The directory of a model with these dimensions, packed as `quant` says.

    Args:
        dimensions: Of one of `ARCHITECTURES`.
        quant: 'MLX bf16', or bits and groups as 'MLX 4bit' and 'MLX 8bit g32'.

    Raises:
        Unsupported: The architecture or the packing has no checkpoint form.
        InvalidRequest: No quant is called so, or its groups do not divide a matrix's rows.
    """
    if dimensions.architecture not in _CLASSES:
        raise Unsupported(
            f"no checkpoint form for '{dimensions.architecture}'; choose a GGUF quant as Q4_K_M, "
            f"or one of {', '.join(ARCHITECTURES)}"
        )
    packing = parse_quant(quant)
    if isinstance(packing, str) or packing.mode not in ("", "affine"):
        raise Unsupported(f"checkpoints are made as MLX bf16 or MLX 4bit, not as {quant:.40}")
    tensors = [
        stored
        for name, shape in shapes(dimensions)
        for stored in _stored(_checkpoint_name(name), shape[::-1], packing)
    ]
    return Checkpoint(_config(dimensions, packing), tuple(tensors))


def write_checkpoint(
    directory: str | Path,
    model: Checkpoint,
    *,
    seed: int = 1,
    with_data: bool = True,
    progress: Progress = lambda _done, _total: None,
) -> Path:
    """Write config, tokenizer and weights into `directory`, which is made; gives its path.

    Args:
        directory: Where; files of these names that are there are replaced.
        model: What to write.
        seed: Another one gives other weights.
        with_data: False leaves the weights out: a sparse file that reads as zeros.
        progress: Told bytes written and in all after each chunk.

    Raises:
        InvalidRequest: The vocabulary is too small for a tokenizer.
        OSError: The disk is full or the place cannot be written.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    vocab_size = model.config["vocab_size"]
    for name, content in (
        ("config.json", model.config),
        ("tokenizer.json", tokenizer_json(vocab_size)),
        ("tokenizer_config.json", tokenizer_config()),
    ):
        (directory / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    header = model.header()
    total = len(header) + model.weights_bytes
    with (directory / SINGLE).open("wb") as file:
        file.write(header)
        for tensor in model.tensors if with_data else ():
            for chunk in _data(tensor, seed):
                file.write(chunk.data)
                progress(file.tell(), total)
        file.truncate(total)
    return directory


def _checkpoint_name(name: str) -> str:
    match = _TENSOR.fullmatch(name)
    layer, module, part = match.groups() if match else (None, "", "")
    own = _OUTER.get(module) if layer is None else _INNER.get(module)
    if own is None:
        raise Unsupported(f"no checkpoint form for the tensor {name}; choose a GGUF quant")
    return f"{own}.{part}" if layer is None else f"model.layers.{layer}.{own}.{part}"


def _stored(name: str, shape: tuple[int, ...], quant: MlxQuant) -> Iterator[StoredTensor]:
    """The arrays that hold one tensor: itself, or packed numbers with scales and offsets."""
    if not quant.mode or len(shape) == 1:
        yield StoredTensor(name, "BF16", shape)
        return
    packing = ROUTER if name.endswith("mlp.gate.weight") else quant
    columns, bits, group = shape[-1], packing.bits, packing.group_size
    if columns % group:
        raise InvalidRequest(
            f"the rows of {name} have {columns} weights, which groups of {group} do not divide; "
            "choose MLX bf16",
            param="quant",
        )
    # Numbers are uniform from 0 to 2^bits - 1; scale and offset give them the deviation of a
    # product that keeps its operand's size, and a mean of zero.
    scale = 1 / math.sqrt(columns) / math.sqrt((4**bits - 1) / 12)
    module, groups = name.removesuffix(".weight"), (*shape[:-1], columns // group)
    yield StoredTensor(name, "U32", (*shape[:-1], columns * bits // 32))
    yield StoredTensor(f"{module}.scales", "BF16", groups, scale)
    yield StoredTensor(f"{module}.biases", "BF16", groups, -scale * (2**bits - 1) / 2)


def _config(d: Dimensions, quant: MlxQuant) -> dict[str, Any]:
    model_type, class_name = _CLASSES[d.architecture]
    config: dict[str, Any] = {
        "architectures": [class_name],
        "model_type": model_type,
        "hidden_size": d.hidden_size,
        "num_hidden_layers": d.num_layers,
        "num_attention_heads": d.num_heads,
        "num_key_value_heads": d.num_kv_heads,
        "head_dim": d.head_dim,
        "intermediate_size": d.feed_forward_size,
        "vocab_size": d.vocab_size,
        "max_position_embeddings": d.context_tokens,
        "rms_norm_eps": 1e-5,
        "rope_theta": d.rope_freq_base,
        "hidden_act": "silu",
        "attention_bias": d.has_qkv_bias,
        "tie_word_embeddings": d.is_tied,
        "torch_dtype": "bfloat16",
        "bos_token_id": d.vocab_size - 2,
        "eos_token_id": d.vocab_size - 1,
    }
    if d.num_experts:
        config |= {
            "num_experts": d.num_experts,
            "num_experts_per_tok": d.num_active_experts,
            "moe_intermediate_size": d.expert_feed_forward_size,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
        }
    if quant.mode:
        config["quantization"] = {"group_size": quant.group_size, "bits": quant.bits}
        if d.num_experts:
            router = {"group_size": ROUTER.group_size, "bits": ROUTER.bits}
            gates = (f"model.layers.{layer}.mlp.gate" for layer in range(d.num_layers))
            config["quantization"] |= dict.fromkeys(gates, router)
    return config


def _data(tensor: StoredTensor, seed: int) -> Iterator[npt.NDArray[np.uint8]]:
    rng = np.random.Generator(np.random.SFC64((seed, zlib.crc32(tensor.name.encode()))))
    number = math.prod(tensor.shape)
    if tensor.value is not None:
        yield _as_bf16(np.full(number, tensor.value, dtype=np.float32))
    elif len(tensor.shape) == 1:
        noise = rng.standard_normal(number, dtype=np.float32)
        is_bias = tensor.name.endswith(".bias")
        yield _as_bf16(BIAS_SPREAD * noise if is_bias else 1 + NORM_SPREAD * noise)
    else:
        yield from _matrix(tensor, rng)


def _matrix(tensor: StoredTensor, rng: np.random.Generator) -> Iterator[npt.NDArray[np.uint8]]:
    left = tensor.size_bytes
    while left:
        size = min(left, CHUNK_BYTES)
        if tensor.dtype == "U32":
            words = rng.bit_generator.random_raw(-(-size // 8))
            yield words.view(np.uint8)[:size]
        else:
            deviation = 1 / math.sqrt(tensor.shape[-1])
            yield random_blocks("BF16", size // 2, deviation, rng).reshape(-1)
        left -= size


def _as_bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(values.astype("<f4").view("<u2")[1::2]).view(np.uint8)
