"""Converts a safetensors Llama checkpoint into a GGUF file.

Whatever is not understood is refused by name: a tensor dropped or a setting ignored gives a model
that runs and is wrong.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gguf
import msgspec
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from numpy.typing import NDArray

from brim.core.model import ModelSpec
from brim.errors import ModelFileError, NotFound, Unsupported
from brim.registry.bpe_vocabulary import Vocabulary, read_vocabulary
from brim.registry.describe import describe_gguf
from brim.registry.safetensors_file import Floats, load_values, read_checkpoint
from brim.registry.safetensors_header import SafeTensor, read_json

Quant = Literal["F16", "Q8_0"]

Q8_0_BLOCK = 32
"""Weights that share one scale; rows of another length stay F16."""


class LlamaConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of config.json that change what the model computes."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    rope_theta: float | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None

    @property
    def num_kv_heads(self) -> int:
        """As many as query heads where nothing else is said."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rope_base(self) -> float:
        """Base of the rotary frequencies; 10,000 is Llama's where nothing is said."""
        return float(self.rope_theta or (self.rope_parameters or {}).get("rope_theta") or 10_000.0)


class Target(msgspec.Struct, frozen=True):
    """What becomes of one tensor of the checkpoint."""

    name: str
    shape: tuple[int, ...]
    num_rope_heads: int = 0
    """Heads whose rows are to be put into llama.cpp's rotary order; 0 leaves them alone."""


def convert_to_gguf(
    model_dir: Path, out: Path, quant: Quant, *, name: str | None = None, license: str | None = None
) -> ModelSpec:
    """Convert the checkpoint in `model_dir` and describe the file that came out.

    `out` gets its name only when it is complete; an existing file is replaced.  Memory: the two
    or three copies of the largest tensor that its conversion needs.

    Args:
        model_dir: Directory with config.json, tokenizer.json and model.safetensors (or its parts).
        out: The GGUF file to write.
        quant: F16, or Q8_0 for matrices whose rows are a multiple of 32 long.
        name: `general.name`; the directory's name unless given.
        license: `general.license`, where it is known.

    Raises:
        NotFound: The directory has no checkpoint, or `out`'s directory does not exist.
        ModelFileError: The checkpoint is damaged or incomplete, or `out` cannot be written.
        Unsupported: Its architecture, tokenizer or a setting is one that brim cannot convert.
    """
    config, tensors, targets, vocabulary = read_convertible(model_dir)
    with _written_whole(out) as partial:
        writer = GGUFWriter(partial, "llama")
        try:
            writer.add_name(name or model_dir.resolve().name)
            if license is not None:
                writer.add_license(license)
            _add_config(writer, config, quant)
            _add_vocabulary(writer, vocabulary)
            _write_tensors(writer, tensors, targets, quant)
        finally:
            writer.close()
    return describe_gguf(out)


class Convertible(NamedTuple):
    """A checkpoint that can be converted: all of it but its weights."""

    config: LlamaConfig
    tensors: dict[str, SafeTensor]
    targets: dict[str, Target]
    vocabulary: Vocabulary


def read_convertible(model_dir: Path) -> Convertible:
    """What is in a model directory, or why it cannot become a GGUF file.

    Raises:
        BrimError: As `convert_to_gguf`, but for the writing.
    """
    config = read_config(model_dir)
    tensors = read_checkpoint(model_dir)
    targets = match_tensors(config, tensors)
    return Convertible(config, tensors, targets, read_vocabulary(model_dir, config.vocab_size))


def read_config(model_dir: Path) -> LlamaConfig:
    """The settings of a Llama checkpoint.

    Raises:
        NotFound: There is no config.json.
        ModelFileError: A setting is missing or of the wrong type.
        Unsupported: The architecture or a setting is one that brim cannot convert.
    """
    path = model_dir / "config.json"
    if not path.is_file():
        raise NotFound(f"{model_dir} has no config.json; name the directory of a checkpoint")
    found = read_json(path)
    architecture = ", ".join(map(str, found.get("architectures") or ("none",)))
    if architecture != "LlamaForCausalLM":
        raise Unsupported(f"brim converts LlamaForCausalLM, and {path} says {architecture}")
    try:
        config = msgspec.convert(found, LlamaConfig, strict=False)
    except msgspec.ValidationError as exc:
        raise ModelFileError(f"{path}: {exc}; get a complete checkpoint") from exc
    for rope in (config.rope_parameters or {}, config.rope_scaling or {}):
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise Unsupported(
                f"brim does not convert {rope_type} rope with {sorted(rope)} ({path})"
            )
    if config.hidden_act != "silu":
        raise Unsupported(f"brim does not convert the activation {config.hidden_act} ({path})")
    sizes = (config.num_attention_heads, config.num_kv_heads, config.head_size, config.hidden_size)
    if min(sizes) < 1 or config.head_size % 2:
        raise ModelFileError(f"{path}: {min(sizes)} is no size of a model; get a whole checkpoint")
    return config


def match_tensors(config: LlamaConfig, tensors: dict[str, SafeTensor]) -> dict[str, Target]:
    """Checkpoint name -> what becomes of it, for exactly the tensors that are there.

    Raises:
        ModelFileError: A tensor is missing, has another shape, or is tied and yet different.
        Unsupported: A tensor is there that a Llama does not have.
    """
    expected = dict(_llama_tensors(config, len(tensors)))
    if config.tie_word_embeddings and "lm_head.weight" in tensors:
        _check_tied(tensors)
        tensors = {name: t for name, t in tensors.items() if name != "lm_head.weight"}
    if unknown := sorted(set(tensors) - set(expected)):
        raise Unsupported(f"brim cannot convert the tensor {unknown[0]}; a Llama has none such")
    if missing := sorted(set(expected) - set(tensors)):
        raise ModelFileError(f"the checkpoint lacks {missing[0]}; download it again")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ModelFileError(
                f"{tensor.path}: {name} has shape {list(tensor.shape)}, and config.json makes it "
                f"{list(expected[name].shape)}; the two belong to different models"
            )
    return {name: expected[name] for name in tensors}


def _llama_tensors(config: LlamaConfig, num_tensors: int) -> Iterator[tuple[str, Target]]:
    hidden, ffn = config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_attention_heads, config.num_kv_heads
    q_rows, kv_rows = heads * config.head_size, kv_heads * config.head_size
    embedding = (config.vocab_size, hidden)
    yield "model.embed_tokens.weight", Target("token_embd.weight", embedding)
    yield "model.norm.weight", Target("output_norm.weight", (hidden,))
    if not config.tie_word_embeddings:
        yield "lm_head.weight", Target("output.weight", embedding)
    # No more layers than there are tensors, whatever config.json says.
    for layer in range(min(config.num_hidden_layers, num_tensors + 1)):
        theirs, ours = f"model.layers.{layer}", f"blk.{layer}"
        for name, target in (
            ("input_layernorm", Target("attn_norm", (hidden,))),
            ("self_attn.q_proj", Target("attn_q", (q_rows, hidden), heads)),
            ("self_attn.k_proj", Target("attn_k", (kv_rows, hidden), kv_heads)),
            ("self_attn.v_proj", Target("attn_v", (kv_rows, hidden))),
            ("self_attn.o_proj", Target("attn_output", (hidden, q_rows))),
            ("post_attention_layernorm", Target("ffn_norm", (hidden,))),
            ("mlp.gate_proj", Target("ffn_gate", (ffn, hidden))),
            ("mlp.up_proj", Target("ffn_up", (ffn, hidden))),
            ("mlp.down_proj", Target("ffn_down", (hidden, ffn))),
        ):
            own_name = f"{ours}.{target.name}.weight"
            yield f"{theirs}.{name}.weight", msgspec.structs.replace(target, name=own_name)


def _check_tied(tensors: dict[str, SafeTensor]) -> None:
    head, embedding = tensors["lm_head.weight"], tensors.get("model.embed_tokens.weight")
    if embedding is None or not np.array_equal(load_values(head), load_values(embedding)):
        raise ModelFileError(
            f"{head.path}: config.json ties lm_head to the embeddings, and they differ"
        )


def _add_config(writer: GGUFWriter, config: LlamaConfig, quant: Quant) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_rope_dimension_count(config.head_size)
    writer.add_key_length(config.head_size)
    writer.add_value_length(config.head_size)
    writer.add_vocab_size(config.vocab_size)
    file_type = LlamaFileType.MOSTLY_F16 if quant == "F16" else LlamaFileType.MOSTLY_Q8_0
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre_tokenizer)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types([int(kind) for kind in vocabulary.types])
    writer.add_token_merges(vocabulary.merges)
    writer.add_add_bos_token(False)
    if vocabulary.bos is not None:
        writer.add_bos_token_id(vocabulary.bos)
    if vocabulary.eos is not None:
        writer.add_eos_token_id(vocabulary.eos)
    if vocabulary.eot is not None:
        writer.add_eot_token_id(vocabulary.eot)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def _write_tensors(
    writer: GGUFWriter, tensors: dict[str, SafeTensor], targets: dict[str, Target], quant: Quant
) -> None:
    """Header first, then one tensor after the other, so that one at a time is in memory."""
    kinds = {name: _stored_as(target.shape, quant) for name, target in targets.items()}
    for name, target in targets.items():
        _announce(writer, target, kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, target in targets.items():
        values = load_values(tensors[name])
        if target.num_rope_heads:
            values = rope_rows_interleaved(values, target.num_rope_heads)
        writer.write_tensor_data(_encoded(tensors[name], values, kinds[name]))


def _stored_as(shape: tuple[int, ...], quant: Quant) -> GGMLQuantizationType:
    if len(shape) == 1:  # norms: llama.cpp wants them in full
        return GGMLQuantizationType.F32
    if quant == "Q8_0" and shape[-1] % Q8_0_BLOCK == 0:
        return GGMLQuantizationType.Q8_0
    return GGMLQuantizationType.F16


def _announce(writer: GGUFWriter, target: Target, kind: GGMLQuantizationType) -> None:
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    row_bytes = target.shape[-1] // block_size * block_bytes
    shape = (*target.shape[:-1], row_bytes)  # the writer counts a row of these types in bytes
    size_bytes = int(np.prod(shape))
    writer.add_tensor_info(target.name, shape, np.dtype(np.uint8), size_bytes, kind)


def rope_rows_interleaved(weight: Floats, num_heads: int) -> Floats:
    """Rows of a Q or K matrix in the order that llama.cpp's rotary embedding takes.

    The checkpoint rotates element i of a head with element i + half, llama.cpp 2i with 2i + 1.

    Args:
        weight: (num_heads * head size, hidden size).
        num_heads: Heads that the rows make up.
    """
    rows, columns = weight.shape
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, columns)
    interleaved: Floats = halves.swapaxes(1, 2).reshape(rows, columns)
    return interleaved


def _encoded(source: SafeTensor, values: Floats, kind: GGMLQuantizationType) -> NDArray[Any]:
    with np.errstate(over="ignore"):  # what overflows is told below, by name
        wide = values if kind is GGMLQuantizationType.F16 else values.astype(np.float32, copy=False)
        encoded: NDArray[Any] = gguf.quantize(wide, kind)
    checked = wide if kind is GGMLQuantizationType.Q8_0 else encoded
    if not np.isfinite(checked).all():
        raise ModelFileError(
            f"{source.path}: {source.name} holds values that are not finite in {kind.name}; "
            "get another checkpoint of the model"
        )
    return encoded


@contextmanager
def _written_whole(out: Path) -> Iterator[Path]:
    """A name to write to: the file gets its own if the block ends well, and vanishes otherwise."""
    if not out.parent.is_dir():
        raise NotFound(f"there is no directory {out.parent} to write {out.name} to; create it")
    partial = out.with_name(out.name + ".part")
    try:
        yield partial
        partial.replace(out)
    except OSError as exc:
        raise ModelFileError(f"{out} cannot be written ({exc}); choose another place") from exc
    finally:
        partial.unlink(missing_ok=True)
