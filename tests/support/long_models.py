"""Variants of the demo model that differ in what they say and weigh on memory as large models do.

Real layers are left out from the end, so that each variant has answers of its own, and *silent*
ones are added: their output matrices are zero, so they change no text, and their KV is paid for.  A
model of some MB then needs a GB of KV, all of which llama.cpp touches when a context is made.
"""

import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGUFValueType
from gguf.gguf_reader import ReaderTensor
from numpy.typing import NDArray

from support.models import DEMO

_OWN_KEYS = ("GGUF.", "general.architecture", "llama.block_count", "llama.context_length")

_OUTPUTS = ("attn_output.weight", "ffn_down.weight")
"""What a layer adds to the residual stream; blocks of zero bytes are zeros in Q8_0."""


@functools.cache
def demo_variant(
    name: str, *, real_layers: int, silent_layers: int = 0, context_tokens: int = 8192
) -> Path:
    """A GGUF file of the demo's first layers and some silent ones, with a window of its own.

    What it says far beyond the demo's own window means nothing, and is the same every time.
    """
    source = gguf.GGUFReader(DEMO)
    path = Path(tempfile.mkdtemp(prefix="brim-test-")) / f"{name}.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for field in source.fields.values():
        if not field.name.startswith(_OWN_KEYS):
            sub_type = field.types[1] if field.types[0] is GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub_type)
    writer.add_block_count(real_layers + silent_layers)
    writer.add_context_length(context_tokens)
    for tensor in source.tensors:
        for tensor_name, data in _copies(tensor, real_layers, silent_layers):
            writer.add_tensor(tensor_name, data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _copies(tensor: ReaderTensor, real: int, silent: int) -> Iterator[tuple[str, NDArray[Any]]]:
    """A tensor under each name that it has in the variant."""
    kind, _, rest = tensor.name.partition(".")
    if kind != "blk":
        yield tensor.name, tensor.data
        return
    layer, _, part = rest.partition(".")
    if int(layer) < real:
        yield tensor.name, tensor.data
    if int(layer) == 0:
        data = np.zeros_like(tensor.data) if part in _OUTPUTS else tensor.data
        for number in range(real, real + silent):
            yield f"blk.{number}.{part}", data
