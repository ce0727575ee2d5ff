"""The two forms of a stand-in, as a trial asks about them: a GGUF file, or a directory for MLX."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from brim.bench.standin.blueprint import Blueprint
from brim.bench.standin.checkpoint import CheckpointModel, write_checkpoint
from brim.bench.standin.slices import layer_kinds, num_layers, sliced
from brim.bench.standin.writer import write
from brim.core.model import KvLayer, ModelSpec
from brim.registry.describe import describe_gguf
from brim.registry.describe_safetensors import describe_directory

Buildable = Blueprint | CheckpointModel
"""What a stand-in is made of."""


class Form(Protocol):
    """A model that can be written, shortened and described."""

    @property
    def num_layers(self) -> int:
        """Of the whole model."""

    @property
    def weights_bytes(self) -> int:
        """Of all tensors."""

    @property
    def layer_bytes(self) -> int:
        """The part of them that layers have."""

    @property
    def file_bytes(self) -> int:
        """On the disk."""

    def kinds(self, kv_layers: Sequence[KvLayer]) -> list[object]:
        """What makes layers cost the same, one entry a layer."""

    def sliced(self, depth: int) -> "Form":
        """The same model with so many layers."""

    def write(self, place: Path, *, with_data: bool = True) -> None:
        """Build it in an empty name below a directory."""

    def describe(self, place: Path, name: str) -> ModelSpec:
        """What was written there."""

    def remove(self, place: Path) -> None:
        """Delete what was written there."""


def form_of(model: Buildable) -> Form:
    """The form that a blueprint or a checkpoint is written in."""
    return GgufForm(model) if isinstance(model, Blueprint) else CheckpointForm(model)


class GgufForm:
    """One GGUF file."""

    def __init__(self, blueprint: Blueprint) -> None:
        self._blueprint = blueprint
        self.num_layers = num_layers(blueprint)
        self.weights_bytes = blueprint.weights_bytes
        self.file_bytes = blueprint.file_bytes
        self.layer_bytes = sum(
            tensor.size_bytes for tensor in blueprint.tensors if tensor.name.startswith("blk.")
        )

    def kinds(self, kv_layers: Sequence[KvLayer]) -> list[object]:
        """See `Form`."""
        return layer_kinds(self._blueprint, kv_layers)

    def sliced(self, depth: int) -> Form:
        """See `Form`."""
        return self if depth == self.num_layers else GgufForm(sliced(self._blueprint, depth))

    def write(self, place: Path, *, with_data: bool = True) -> None:
        """See `Form`."""
        write(self._path(place), self._blueprint, with_data=with_data)

    def describe(self, place: Path, name: str) -> ModelSpec:
        """See `Form`."""
        return describe_gguf(self._path(place), name)

    def remove(self, place: Path) -> None:
        """See `Form`."""
        self._path(place).unlink()

    def _path(self, place: Path) -> Path:
        return place.with_name(place.name + ".gguf")


class CheckpointForm:
    """A directory of safetensors; its layers are all alike."""

    def __init__(self, model: CheckpointModel) -> None:
        self._model = model
        self._checkpoint = model.checkpoint()
        self.num_layers = model.dimensions.num_layers
        self.weights_bytes = self._checkpoint.weights_bytes
        self.file_bytes = len(self._checkpoint.header()) + self.weights_bytes
        self.layer_bytes = sum(
            tensor.size_bytes
            for tensor in self._checkpoint.tensors
            if tensor.name.startswith("model.layers.")
        )

    def kinds(self, kv_layers: Sequence[KvLayer]) -> list[object]:
        """See `Form`."""
        kept: list[object] = [*kv_layers, *[None] * self.num_layers]
        return kept[: self.num_layers]

    def sliced(self, depth: int) -> Form:
        """See `Form`."""
        return CheckpointForm(self._model.sliced(depth))

    def write(self, place: Path, *, with_data: bool = True) -> None:
        """See `Form`."""
        write_checkpoint(place, self._checkpoint, with_data=with_data)

    def describe(self, place: Path, name: str) -> ModelSpec:
        """See `Form`."""
        return describe_directory(place, name=name)

    def remove(self, place: Path) -> None:
        """See `Form`."""
        shutil.rmtree(place)
