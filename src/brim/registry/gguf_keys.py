"""The metadata of one GGUF model, asked for by meaning: text, counts, numbers of each layer.

A key that is missing, of another type or absurd becomes one sentence that names it and the file.
"""

from collections.abc import Mapping

from brim.errors import ModelFileError
from brim.registry.gguf_header import GgufArray, Scalar

MAX_LENGTH = 1 << 24
"""Largest width, head count or window that is believed.  The widest published models have rows of
65,536 values and windows of 10 M tokens; the bound keeps every product of two within 64 bits."""


MERGES = "tokenizer.ggml.merges"


class GgufKeys:
    """Metadata whose keys begin with the architecture's name.

    Args:
        where: The file, for messages.
        metadata: As the header has it.
    """

    def __init__(self, where: str, metadata: Mapping[str, Scalar | GgufArray]) -> None:
        self.where = where
        self.metadata = metadata
        self.architecture = self.text("general.architecture") or ""

    def text(self, key: str) -> str | None:
        """A whole key's text; None where it is missing or empty."""
        value = self.metadata.get(key)
        return value if isinstance(value, str) and value else None

    def has(self, key: str) -> bool:
        """Whether the architecture's key is there."""
        return f"{self.architecture}.{key}" in self.metadata

    def widths(self) -> dict[str, int]:
        """The architecture's keys that are whole numbers, without its name before them.

        And how many merges the tokenizer has, whose tables take memory.
        """
        prefix = f"{self.architecture}."
        merges = self.metadata.get(MERGES)
        return {MERGES: merges.length if isinstance(merges, GgufArray) else 0} | {
            key.removeprefix(prefix): value
            for key, value in self.metadata.items()
            if key.startswith(prefix)
            and isinstance(value, int)
            and not isinstance(value, bool)
            and 0 <= value <= MAX_LENGTH
        }

    def wrong(self, key: str, value: object) -> ModelFileError:
        """What to raise about a key's value."""
        shown = "missing" if value is None else f"{value!r:.40}"
        return ModelFileError(
            f"{self.where} is damaged or incomplete: {key} is {shown}; "
            "get another file of the model"
        )

    def count(self, key: str, *, default: int | None = None, most: int = MAX_LENGTH) -> int:
        """A key of the architecture that counts something; zero only where it is the default.

        Raises:
            ModelFileError: It is missing without a default, or no number from 1 to `most`.
        """
        key = f"{self.architecture}.{key}"
        value = self.metadata.get(key, default)
        if not isinstance(value, int) or value > most or (value < 1 and value != default):
            raise self.wrong(key, value)
        return value

    def optional(self, key: str) -> int:
        """A key that may be missing or zero, which both mean none."""
        return self.count(key, default=0)

    def per_layer(self, key: str, num_layers: int, *, default: int) -> tuple[int, ...]:
        """A key that has one number for all layers, or an array with one for each.

        Raises:
            ModelFileError: There are not as many, or one is no number from 0 to MAX_LENGTH.
        """
        key = f"{self.architecture}.{key}"
        value = self.metadata.get(key, default)
        items = (value.items or ()) if isinstance(value, GgufArray) else (value,) * num_layers
        numbers = tuple(i for i in items if isinstance(i, int) and 0 <= i <= MAX_LENGTH)
        if len(numbers) != num_layers:
            raise self.wrong(key, value)
        return numbers

    def flags(self, key: str, num_layers: int) -> tuple[bool, ...] | None:
        """An array with a truth value for each layer; None where there is no such array.

        Raises:
            ModelFileError: It has fewer items than layers.
        """
        value = self.metadata.get(f"{self.architecture}.{key}")
        if not isinstance(value, GgufArray):
            return None
        items = value.items or ()
        if len(items) < num_layers:
            raise self.wrong(f"{self.architecture}.{key}", value)
        return tuple(bool(item) for item in items[:num_layers])
