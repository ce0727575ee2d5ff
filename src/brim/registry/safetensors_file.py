"""Reads the values of unquantised safetensors checkpoints, which are plain arrays."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brim.errors import Unsupported
from brim.registry.safetensors_header import SafeTensor, read_headers

Floats = NDArray[np.floating[Any]]
"""Weights as float16 or float32."""

STORED = {"F16": "<f2", "BF16": "<u2", "F32": "<f4"}
"""Dtypes whose values brim reads, and what their bytes are; others (F8, I8, ...) need scales."""


def read_checkpoint(model_dir: Path) -> dict[str, SafeTensor]:
    """All tensors of a model directory, from one file or from all parts that its index names.

    Raises:
        NotFound: The directory holds no safetensors model.
        ModelFileError: A file is damaged, cut short or missing.
        Unsupported: A tensor has a dtype whose values brim does not read.
    """
    tensors = read_headers(model_dir)
    for tensor in tensors.values():
        if tensor.dtype not in STORED:
            raise Unsupported(
                f"{tensor.path}: the tensor {tensor.name} is stored as {tensor.dtype}, and brim "
                f"converts {', '.join(STORED)}; get the unquantised checkpoint"
            )
    return tensors


def load_values(tensor: SafeTensor) -> Floats:
    """A tensor's values, as float16 where they are stored so and as float32 otherwise."""
    stored = np.fromfile(
        tensor.path, STORED[tensor.dtype], tensor.num_elements, offset=tensor.offset
    ).reshape(tensor.shape)
    if tensor.dtype == "BF16":  # the upper half of a float32
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored
