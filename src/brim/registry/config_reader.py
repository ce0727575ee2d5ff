"""Typed access to a Hugging Face config.json, whose publishers call one thing by many names."""

import json
from collections.abc import Mapping
from typing import Any

from brim.errors import ModelFileError
from brim.registry.gguf_keys import MAX_LENGTH

LANGUAGE_PARTS = ("text_config", "llm_config", "language_config")
"""Where the config of a model that also sees or hears keeps that of its language model."""


class Config:
    """One model's config.

    Args:
        config: The parsed file.
        name: The model, for messages.
    """

    def __init__(self, config: Mapping[str, Any], name: str) -> None:
        self.name = name
        part = next((k for k in LANGUAGE_PARTS if isinstance(config.get(k), Mapping)), None)
        # The language part's own keys win; a few (tied embeddings, dtype) stand outside.
        self.items: dict[str, Any] = {**config, **config[part]} if part else dict(config)

    @property
    def model_type(self) -> str:
        """The architecture's name in transformers, without '_text'."""
        value = self.items.get("model_type")
        if not isinstance(value, str) or not value:
            raise self.lacks("model_type")
        return value.removesuffix("_text")

    def lacks(self, key: str) -> ModelFileError:
        """What to raise about a key that is missing."""
        return ModelFileError(
            f"the config of {self.name} has no {key}; give the config.json of a language model"
        )

    def number(self, *keys: str, default: int | None = None) -> int:
        """The first of several keys that is there, as a number from 0 to MAX_LENGTH.

        Of a list with a number for each layer it is the largest.

        Raises:
            ModelFileError: None is there and there is no default, or it is no such number.
        """
        for key in keys:
            value = self.items.get(key)
            if isinstance(value, list) and value and all(isinstance(i, int) for i in value):
                value = max(value)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise self._wrong(key, value)
            # MAX_LENGTH + 1 stands for infinities and what is larger, which no int() takes.
            if not 0 <= value <= MAX_LENGTH or value != int(value):
                raise self._wrong(key, value)
            return int(value)
        if default is None:
            raise self.lacks(keys[0])
        return default

    def for_layer(self, layer: int, *keys: str, default: int | None = None) -> int:
        """As `number`, but of a list the layer's own item."""
        for key in keys:
            value = self.items.get(key)
            if isinstance(value, list) and layer < len(value):
                return Config({key: value[layer]}, self.name).number(key)
        return self.number(*keys, default=default)

    def flag(self, key: str, default: bool = False) -> bool:
        """A truth value; whatever else stands there counts as the default."""
        value = self.items.get(key)
        return value if isinstance(value, bool) else default

    def real(self, key: str, default: float) -> float:
        """A factor; whatever is no positive number counts as the default."""
        value = self.items.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return default
        return float(value) if 0 < value < MAX_LENGTH else default

    def words(self, *keys: str) -> list[str] | None:
        """The first of several keys that is a list of words."""
        for key in keys:
            value = self.items.get(key)
            if isinstance(value, list) and value and all(isinstance(i, str) for i in value):
                return list(value)
        return None

    def numbers(self, key: str) -> list[int]:
        """A list of numbers, empty where there is none."""
        value = self.items.get(key)
        return [i for i in value if isinstance(i, int)] if isinstance(value, list) else []

    def part(self, key: str) -> "Config":
        """A nested object, empty where there is none."""
        value = self.items.get(key)
        return Config(value if isinstance(value, Mapping) else {}, self.name)

    def digest_text(self) -> bytes:
        """The config as bytes that are the same for the same config."""
        return json.dumps(self.items, sort_keys=True, default=str).encode()

    def _wrong(self, key: str, value: object) -> ModelFileError:
        return ModelFileError(
            f"the config of {self.name} says {key} is {value!r:.40}; give the config.json as "
            "published"
        )
