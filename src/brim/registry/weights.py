"""Sums over a model's weights: all of them, and those that one decoded token reads."""

import re
from collections import Counter
from collections.abc import Iterable

import msgspec

from brim.registry.gguf_header import TensorInfo

EMBEDDING = "token_embd.weight"

LOOKED_UP = frozenset({
    EMBEDDING, "per_layer_token_embd.weight", "position_embd.weight", "token_types.weight",
})  # fmt: skip
"""Tables of which a token reads a row; the first is the output matrix as well where there is no
other."""

OUTPUT = "output.weight"

EXPERT = re.compile(r"blk\.\d+\.ffn_(gate|up|down|gate_up)(_exps\.|\.\d+\.)")
"""Routed experts, in one tensor for all or, in early mixtures, one for each."""

OTHER_PARTS = ("v.", "a.", "mm.")
"""How weights begin that see, hear or draft: they are not read for a token of text."""

LAYER = re.compile(r"blk\.(\d+)\.")

NOT_MATRIX = re.compile(r"(_norm|ssm_conv1d\w*|shortconv\.conv|ssm_a|ssm_d|ffn_gate_tid2eid)\.")
"""Weights of two dimensions that nothing is multiplied with as a matrix."""


class WeightSums(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes and counts of a model's weights; the fields are ModelSpec's."""

    num_parameters: int
    weights_bytes: int
    active_bytes: int
    active_parameters: int
    matrix_bytes: dict[str, int]
    embedding_bytes: int
    feed_forward_size: int
    """0 where no tensor tells."""


def sum_weights(
    tensors: Iterable[TensorInfo], *, num_layers: int, num_experts: int, num_active_experts: int
) -> WeightSums:
    """Sums over tensors with GGUF's names.

    Args:
        tensors: All of the model's.
        num_layers: Layers that decode; what lies in later ones (heads that predict several tokens)
            takes memory and is not read.
        num_experts: Routed experts of a layer, 0 for none.
        num_active_experts: Those that one token uses.
    """
    tensors = tuple(tensors)
    is_tied = not any(tensor.name == OUTPUT for tensor in tensors)
    active_bytes = active_parameters = 0
    matrix_bytes = Counter[str]()
    for tensor in tensors:
        if tensor.name.startswith(OTHER_PARTS):
            continue
        if tensor.name in LOOKED_UP and not (is_tied and tensor.name == EMBEDDING):
            continue
        if len(tensor.shape) > 1 and not NOT_MATRIX.search(tensor.name):
            matrix_bytes[tensor.type_name] += tensor.size_bytes
        layer = LAYER.match(tensor.name)
        if layer and int(layer[1]) >= num_layers:
            continue
        used, of = 1, 1
        if num_experts and EXPERT.match(tensor.name):
            used, of = num_active_experts, num_experts
        active_bytes += tensor.size_bytes * used // of
        active_parameters += tensor.num_elements * used // of
    return WeightSums(
        num_parameters=sum(tensor.num_elements for tensor in tensors),
        weights_bytes=sum(tensor.size_bytes for tensor in tensors),
        active_bytes=active_bytes,
        active_parameters=active_parameters,
        matrix_bytes=dict(matrix_bytes),
        embedding_bytes=sum(t.size_bytes for t in tensors if t.name == EMBEDDING),
        feed_forward_size=_feed_forward_size(tensors),
    )


def _feed_forward_size(tensors: tuple[TensorInfo, ...]) -> int:
    """Row length of the widest down projection: a dense layer's, else a routed expert's."""
    dense = [t.shape[0] for t in tensors if t.name.endswith(".ffn_down.weight")]
    experts = (t.shape[0] for t in tensors if t.name.endswith(".ffn_down_exps.weight"))
    return max(dense, default=0) or max(experts, default=0)
