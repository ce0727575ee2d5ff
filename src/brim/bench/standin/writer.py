"""Writes a blueprint as a GGUF file: streamed, in bounded memory, at the speed of the disk.

What a tensor gets depends on its name: matrices get random blocks whose spread keeps activations of
one size through all layers, norms values around one, biases around zero, state decays negative
ones.  Rows do not repeat.  The same blueprint and seed give the same file on the same numpy.
"""

import math
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from brim.bench.standin.blocks import random_blocks
from brim.bench.standin.blueprint import TYPE_NUMBERS, Blueprint, Tensor
from brim.registry.ggml_types import GGML_TYPES

CHUNK_BYTES = 8 * 1024 * 1024
"""What is made at a time: fits in caches of any machine, and calls cost nothing beside it."""

Floats = npt.NDArray[np.float32]
Progress = Callable[[int, int], None]
"""Called with bytes written and bytes in all."""


def write(
    path: str | Path,
    blueprint: Blueprint,
    *,
    seed: int = 1,
    with_data: bool = True,
    progress: Progress = lambda _done, _total: None,
) -> Path:
    """Write the file that `blueprint` describes; gives its path.

    Args:
        path: Where; an existing file is replaced.
        blueprint: Pairs and tensors.
        seed: Another one gives other weights.
        with_data: False leaves the weights out: a sparse file of the right size that takes a few
            megabytes of disk and reads as zeros, for dry runs that never touch a weight.
        progress: Told after each chunk.

    Raises:
        ModelFileError: A tensor's rows do not divide into its type's blocks.
        OSError: The disk is full or the place cannot be written.
    """
    path = Path(path)
    header = blueprint.header()
    total = len(header) + sum(blueprint.padded(t.size_bytes) for t in blueprint.tensors)
    with path.open("wb") as file:
        file.write(header)
        for tensor in blueprint.tensors if with_data else ():
            for chunk in _data(tensor, seed):
                file.write(chunk.data)
                progress(file.tell(), total)
            file.write(bytes(blueprint.padded(tensor.size_bytes) - tensor.size_bytes))
        # Extends a sparse file, and does nothing to a whole one.
        file.truncate(total)
    return path


def _data(tensor: Tensor, seed: int) -> Iterator[npt.NDArray[np.uint8]]:
    rng = np.random.Generator(np.random.SFC64((seed, zlib.crc32(tensor.name.encode()))))
    values = _special_values(tensor, rng)
    if values is not None and tensor.type_name in _ENCODERS:
        yield _ENCODERS[tensor.type_name](values)
        return
    kind = GGML_TYPES[TYPE_NUMBERS[tensor.type_name]]
    # A product with as many terms as a row has keeps its operand's size at this deviation.
    deviation = 1 / math.sqrt(tensor.shape[0])
    left = tensor.size_bytes // kind.block_bytes
    while left:
        number = min(left, CHUNK_BYTES // kind.block_bytes)
        yield random_blocks(tensor.type_name, number, deviation, rng).reshape(-1)
        left -= number


def _special_values(tensor: Tensor, rng: np.random.Generator) -> Floats | None:
    """Values of tensors that are no matrices; None for those that are."""
    name, number = tensor.name, tensor.num_elements
    if "rope_f" in name:
        return np.ones(number, dtype=np.float32)
    if name.endswith("ssm_a"):
        # Decay rates: a state with a positive one grows without end.
        return -(0.5 + rng.random(number, dtype=np.float32))
    if name.endswith(".bias") or "sinks" in name:
        return 0.02 * rng.standard_normal(number, dtype=np.float32)
    if len(tensor.shape) == 1 or "norm" in name or name.endswith(("ssm_d", "scale")):
        return 1 + 0.05 * rng.standard_normal(number, dtype=np.float32)
    return None


def _as_f32(values: Floats) -> npt.NDArray[np.uint8]:
    return values.astype("<f4").view(np.uint8)


def _as_f16(values: Floats) -> npt.NDArray[np.uint8]:
    return values.astype("<f2").view(np.uint8)


def _as_bf16(values: Floats) -> npt.NDArray[np.uint8]:
    high_halves = values.astype("<f4").view("<u2")[1::2]
    return np.ascontiguousarray(high_halves).view(np.uint8)


_ENCODERS: dict[str, Callable[[Floats], npt.NDArray[np.uint8]]] = {
    "F32": _as_f32,
    "F16": _as_f16,
    "BF16": _as_bf16,
}
