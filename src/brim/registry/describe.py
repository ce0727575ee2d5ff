"""What a GGUF model is: its header's keys turned into a `ModelSpec`.

Says nothing about whether the model fits or runs here: that is planner's and the engine's.
"""

import hashlib
import re
from collections import Counter
from pathlib import Path

from brim.core.model import ModelSpec
from brim.errors import ModelFileError
from brim.registry.ggml_types import FILE_TYPE_GUESSED, FILE_TYPES
from brim.registry.gguf_header import GgufArray, GgufHeader, read_gguf_header

SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
"""How llama.cpp names the parts of a split file; it finds the others by it."""

RECURRENT_TENSOR = re.compile(r"blk\.(\d+)\.(ssm_|time_mix_|shortconv)")
"""Hybrids say in many ways which layers are recurrent; those that are have such weights."""

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
    _check_split(headers)
    return _Description(headers).spec(name or model_stem(path.name).lower())


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
    if not 1 <= int(match["number"]) <= count <= MAX_PARTS:
        raise ModelFileError(f"{path} is numbered {match['number']} of {count}; rename the parts")
    names = (f"{match['stem']}-{number:05}-of-{count:05}{suffix}" for number in range(1, count + 1))
    parts = [path.with_name(name) for name in names]
    if missing := [part.name for part in parts if not part.exists()]:
        raise ModelFileError(
            f"{path.parent} lacks {' and '.join(missing)} of the {count} parts of this model; "
            "put all parts into one directory"
        )
    return parts


def _check_split(headers: list[GgufHeader]) -> None:
    """Each part says itself which one it is; the names must agree."""
    for number, header in enumerate(headers):
        count, own = header.metadata.get("split.count", 0), header.metadata.get("split.no", 0)
        if (count or 1) != len(headers) or own != number:
            raise ModelFileError(
                f"{header.path} says that it is part {own} (counted from 0) of {count}, but stands "
                f"as {number} of {len(headers)}; give the parts their names as published"
            )


class _Description:
    """The keys of one model's first header, and the tensors of all its parts."""

    def __init__(self, headers: list[GgufHeader]) -> None:
        self.headers = headers
        self.path = headers[0].path
        self.metadata = headers[0].metadata
        self.tensors = [tensor for header in headers for tensor in header.tensors]
        self.architecture = self.text("general.architecture")

    def spec(self, name: str) -> ModelSpec:
        self.check_is_text_model()
        hidden_size = self.count("embedding_length")
        num_layers = self.count("block_count", most=len(self.tensors))
        heads = self.per_layer("attention.head_count", num_layers, default=0)
        width = hidden_size // max(heads) if max(heads) else 0
        return ModelSpec(
            name=name,
            # Links are kept: in a download cache only they have the names that splits need.
            paths=tuple(str(header.path.absolute()) for header in self.headers),
            format="gguf",
            architecture=self.architecture or "",
            fingerprint=self.fingerprint(),
            num_parameters=sum(tensor.num_elements for tensor in self.tensors),
            weights_bytes=sum(tensor.size_bytes for tensor in self.tensors),
            num_layers=num_layers,
            hidden_size=hidden_size,
            num_heads=max(heads),
            num_kv_heads=self.num_kv_heads(num_layers, heads),
            key_dim=self.count("attention.key_length", default=width),
            value_dim=self.count("attention.value_length", default=width),
            vocab_size=self.vocab_size(),
            trained_context_tokens=self.count("context_length"),
            feed_forward_size=max(self.per_layer("feed_forward_length", num_layers, default=0)),
            recurrent_state_bytes=self.recurrent_state_bytes(hidden_size),
            quant=self.quant(),
            chat_template=self.text("tokenizer.chat_template"),
            license=self.text("general.license"),
        )

    def check_is_text_model(self) -> None:
        kind = self.text("general.type") or "model"
        what = NOT_TEXT_MODELS.get(kind)
        if what is None and self.architecture == "clip":
            what = NOT_TEXT_MODELS["mmproj"]
        if what is not None:
            raise ModelFileError(f"{self.path} is {what}; name the language model it belongs to")
        if not self.architecture or not self.tensors:
            lack = "tensors" if self.architecture else "general.architecture"
            raise ModelFileError(f"{self.path} has no {lack}; get a complete file of the model")

    # --- keys ----------------------------------------------------------------------------------

    def text(self, key: str) -> str | None:
        value = self.metadata.get(key)
        return value if isinstance(value, str) and value else None

    def wrong(self, key: str, value: object) -> ModelFileError:
        shown = "missing" if value is None else f"{value!r:.40}"
        return ModelFileError(
            f"{self.path} is damaged or incomplete: {key} is {shown}; get another file of the model"
        )

    def count(self, key: str, *, default: int | None = None, most: int = 2**31) -> int:
        """A key of the architecture that counts something; zero only where it is the default."""
        key = f"{self.architecture}.{key}"
        value = self.metadata.get(key, default)
        if not isinstance(value, int) or value > most or (value < 1 and value != default):
            raise self.wrong(key, value)
        return value

    def per_layer(self, key: str, num_layers: int, *, default: int) -> tuple[int, ...]:
        """A key that has one number for all layers, or an array with one for each."""
        key = f"{self.architecture}.{key}"
        value = self.metadata.get(key, default)
        if isinstance(value, GgufArray):
            items = value.items or ()
        else:
            items = (value,) * num_layers
        numbers = tuple(i for i in items if isinstance(i, int) and 0 <= i < 2**31)
        if len(numbers) != num_layers:
            raise self.wrong(key, value)
        return numbers

    # --- what takes more than one key ----------------------------------------------------------

    def num_kv_heads(self, num_layers: int, heads: tuple[int, ...]) -> tuple[int, ...]:
        if f"{self.architecture}.attention.head_count_kv" not in self.metadata:
            return heads
        kv_heads = self.per_layer("attention.head_count_kv", num_layers, default=0)
        # Hybrids such as qwen3next give one number and say which layers attend at all.
        interval = self.metadata.get(f"{self.architecture}.full_attention_interval")
        if isinstance(interval, int) and interval > 1:
            return tuple(n if i % interval == 0 else 0 for i, n in enumerate(kv_heads, start=1))
        return kv_heads

    def recurrent_state_bytes(self, hidden_size: int) -> int:
        """What one sequence keeps in the recurrent layers: f32 whatever the KV type is.

        Source: `n_embd_r` and `n_embd_s` of llama.cpp's llama-hparams.cpp, for RWKV, LFM2 and all
        that have Mamba's keys (Mamba, Jamba, Qwen3-Next, ...).
        """
        names = (tensor.name for tensor in self.tensors)
        layers = {match[1] for name in names if (match := RECURRENT_TENSOR.match(name))}
        head_size = self.count("wkv.head_size", default=0)
        cache = self.count("shortconv.l_cache", default=0)
        if head_size:
            num_values = hidden_size * (self.count("token_shift_count", default=2) + head_size)
        elif cache:
            num_values = hidden_size * (cache - 1)
        else:
            inner = self.count("ssm.inner_size", default=0)
            state = self.count("ssm.state_size", default=0)
            kernel = self.count("ssm.conv_kernel", default=0)
            convolved = inner + 2 * self.count("ssm.group_count", default=0) * state
            num_values = max(0, kernel - 1) * convolved + state * inner
        return len(layers) * num_values * 4

    def vocab_size(self) -> int:
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        if isinstance(tokens, GgufArray) and tokens.length:
            return tokens.length
        for tensor in self.tensors:
            if tensor.name == "token_embd.weight" and len(tensor.shape) == 2:
                return tensor.shape[1]
        return self.count("vocab_size")

    def quant(self) -> str:
        """The recipe's name, or the type that holds most bytes where the file gives none."""
        file_type = self.metadata.get("general.file_type")
        if isinstance(file_type, int) and file_type & ~FILE_TYPE_GUESSED in FILE_TYPES:
            return FILE_TYPES[file_type & ~FILE_TYPE_GUESSED]
        bytes_by_type = Counter[str]()
        for tensor in self.tensors:
            bytes_by_type[tensor.type_name] += tensor.size_bytes
        return bytes_by_type.most_common(1)[0][0]

    def fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for header in self.headers:
            digest.update(f"{header.digest} {header.file_bytes}\n".encode())
        return digest.hexdigest()
