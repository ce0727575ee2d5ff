"""What a GGUF model is: its header's keys turned into a `ModelSpec`.

Says nothing about whether the model fits or runs here: that is planner's and the engine's.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from brim.core.model import ModelSpec
from brim.errors import ModelFileError
from brim.registry.ggml_types import FILE_TYPE_GUESSED, FILE_TYPES
from brim.registry.gguf_header import GgufArray, GgufHeader, TensorInfo, read_gguf_header
from brim.registry.gguf_keys import GgufKeys
from brim.registry.layers import (
    kv_layers,
    num_kv_heads,
    recurrent_layers,
    recurrent_state_values,
)
from brim.registry.weights import EMBEDDING, sum_weights

SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
"""How llama.cpp names the parts of a split file; it finds the others by it."""

MAX_PARTS = 1_000
"""Parts of one model; the largest published ones have under a hundred."""

NOT_TEXT_MODELS = {
    "mmproj": "a vision or audio projector",
    "adapter": "a LoRA adapter",
    "imatrix": "an importance matrix",
}
"""`general.type` of GGUF files that go with a language model and are none."""


def describe_gguf(path: str | Path, name: str | None = None) -> ModelSpec:
    """The model in a GGUF file, or in all parts of a split one, whichever part is named.

    Args:
        path: The file.
        name: What clients will call it; the lower-cased file stem unless given.

    Raises:
        NotFound: There is no such file.
        ModelFileError: It is damaged, cut short, lacks a part, or is no language model.
    """
    path = Path(path)
    parts = split_parts(path)
    headers = [read_gguf_header(part) for part in parts]
    # Links are kept: in a download cache only they have the names that splits need.
    paths = tuple(str(part.absolute()) for part in parts)
    return describe_headers(headers, name or model_stem(path.name).lower(), paths=paths)


def describe_headers(
    headers: Sequence[GgufHeader], name: str, *, paths: tuple[str, ...] = ()
) -> ModelSpec:
    """The model whose parts have these headers, in order; `paths` where they are files here.

    Raises:
        ModelFileError: They do not belong together, or are of no language model.
    """
    _check_split(headers)
    model = GgufModel(
        GgufKeys(headers[0].where, headers[0].metadata),
        [tensor for header in headers for tensor in header.tensors],
    )
    return model.spec(name, paths=paths, fingerprint=_fingerprint(headers))


def model_stem(file_name: str) -> str:
    """A file's name without suffix and without its number among the parts.

    Example:
        >>> model_stem("Qwen3-8B-Q4_K_M-00001-of-00002.gguf")
        'Qwen3-8B-Q4_K_M'
    """
    match = SPLIT_NAME.fullmatch(file_name)
    return match["stem"] if match else Path(file_name).stem


def split_parts(path: Path) -> list[Path]:
    """All parts of the model that `path` belongs to, in order; the file alone if it is not split.

    Raises:
        ModelFileError: A part is missing.
    """
    match = SPLIT_NAME.fullmatch(path.name)
    if match is None or not path.exists():
        return [path]
    count, suffix = int(match["count"]), path.suffix
    check_part(str(path), int(match["number"]), count)
    names = (f"{match['stem']}-{number:05}-of-{count:05}{suffix}" for number in range(1, count + 1))
    parts = [path.with_name(name) for name in names]
    if missing := [part.name for part in parts if not part.exists()]:
        raise ModelFileError(
            f"{path.parent} lacks {' and '.join(missing)} of the {count} parts of this model; "
            "put all parts into one directory"
        )
    return parts


def check_part(where: str, number: int, count: int) -> None:
    """Refuse a part whose name gives it a number that no part has.

    Raises:
        ModelFileError: It is not among the parts, or they are too many.
    """
    if not 1 <= number <= count <= MAX_PARTS:
        raise ModelFileError(f"{where} is numbered {number} of {count}; rename the parts")


def _check_split(headers: Sequence[GgufHeader]) -> None:
    """Each part says itself which one it is; the names must agree."""
    for number, header in enumerate(headers):
        count, own = header.metadata.get("split.count", 0), header.metadata.get("split.no", 0)
        if (count or 1) != len(headers) or own != number:
            raise ModelFileError(
                f"{header.where} says that it is part {own} (counted from 0) of {count}, but "
                f"stands as {number} of {len(headers)}; give the parts their names as published"
            )


class GgufModel:
    """The keys of one model's first header, and the tensors of all its parts.

    Args:
        keys: Its metadata.
        tensors: Of all parts.
    """

    def __init__(self, keys: GgufKeys, tensors: Sequence[TensorInfo]) -> None:
        self.keys = keys
        self.tensors = tensors

    def spec(self, name: str, *, paths: tuple[str, ...], fingerprint: str) -> ModelSpec:
        """Its description.

        Raises:
            ModelFileError: It is no language model, or a key is missing or damaged.
        """
        self._check_is_text_model()
        keys = self.keys
        hidden_size = keys.count("embedding_length")
        num_blocks = keys.count("block_count", most=len(self.tensors))
        # The last blocks may be heads that predict several tokens, which plain decoding skips.
        num_layers = num_blocks - keys.count("nextn_predict_layers", default=0, most=num_blocks - 1)
        heads = keys.per_layer("attention.head_count", num_blocks, default=0)[:num_layers]
        width = hidden_size // max(heads) if max(heads) else 0
        key_dim = keys.count("attention.key_length", default=width)
        value_dim = keys.count("attention.value_length", default=width)
        names = [tensor.name for tensor in self.tensors]
        is_recurrent = recurrent_layers(keys, num_blocks, names)[:num_layers]
        kv_heads = num_kv_heads(keys, num_blocks, heads, is_recurrent)
        num_experts = keys.optional("expert_count")
        num_active = min(self._num_active_experts(num_blocks), num_experts)
        sums = sum_weights(
            self.tensors,
            num_layers=num_layers,
            num_experts=num_experts,
            num_active_experts=num_active,
        )
        state_values = recurrent_state_values(keys, hidden_size, max(heads), key_dim)
        return ModelSpec(
            name=name,
            paths=paths,
            format="gguf",
            architecture=keys.architecture,
            fingerprint=fingerprint,
            num_parameters=sums.num_parameters,
            weights_bytes=sums.weights_bytes,
            num_layers=num_layers,
            hidden_size=hidden_size,
            num_heads=max(heads),
            num_kv_heads=kv_heads,
            key_dim=key_dim,
            value_dim=value_dim,
            vocab_size=self._vocab_size(),
            trained_context_tokens=keys.count("context_length", most=2**31),
            kv_layers=kv_layers(keys, kv_heads, is_recurrent, key_dim=key_dim, value_dim=value_dim),
            feed_forward_size=sums.feed_forward_size or self._feed_forward_length(num_blocks),
            num_experts=num_experts,
            num_active_experts=num_active,
            active_bytes=sums.active_bytes,
            active_parameters=sums.active_parameters,
            matrix_bytes=sums.matrix_bytes,
            embedding_bytes=sums.embedding_bytes,
            num_recurrent_layers=sum(is_recurrent),
            recurrent_state_bytes=sum(is_recurrent) * state_values * 4,
            widths=keys.widths(),
            quant=self._quant(),
            chat_template=keys.text("tokenizer.chat_template"),
            license=keys.text("general.license"),
        )

    def _check_is_text_model(self) -> None:
        kind = self.keys.text("general.type") or "model"
        what = NOT_TEXT_MODELS.get(kind)
        if what is None and self.keys.architecture == "clip":
            what = NOT_TEXT_MODELS["mmproj"]
        if what is not None:
            raise ModelFileError(
                f"{self.keys.where} is {what}; name the language model it belongs to"
            )
        if not self.keys.architecture or not self.tensors:
            lack = "tensors" if self.keys.architecture else "general.architecture"
            raise ModelFileError(
                f"{self.keys.where} has no {lack}; get a complete file of the model"
            )

    def _num_active_experts(self, num_blocks: int) -> int:
        return max(self.keys.per_layer("expert_used_count", num_blocks, default=0))

    def _feed_forward_length(self, num_blocks: int) -> int:
        return max(self.keys.per_layer("feed_forward_length", num_blocks, default=0))

    def _vocab_size(self) -> int:
        tokens = self.keys.metadata.get("tokenizer.ggml.tokens")
        if isinstance(tokens, GgufArray) and tokens.length:
            return tokens.length
        for tensor in self.tensors:
            if tensor.name == EMBEDDING and len(tensor.shape) == 2:
                return tensor.shape[1]
        return self.keys.count("vocab_size")

    def _quant(self) -> str:
        """The recipe's name, or the type that holds most bytes where the file gives none."""
        file_type = self.keys.metadata.get("general.file_type")
        if isinstance(file_type, int) and file_type & ~FILE_TYPE_GUESSED in FILE_TYPES:
            return FILE_TYPES[file_type & ~FILE_TYPE_GUESSED]
        bytes_by_type = Counter[str]()
        for tensor in self.tensors:
            bytes_by_type[tensor.type_name] += tensor.size_bytes
        return bytes_by_type.most_common(1)[0][0]


def _fingerprint(headers: Sequence[GgufHeader]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for header in headers:
        digest.update(f"{header.digest} {header.file_bytes}\n".encode())
    return digest.hexdigest()
