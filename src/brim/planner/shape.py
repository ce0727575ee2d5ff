"""What of a model decides its speed, taken from its description."""

from brim.core.forecast import SpeedShape
from brim.core.model import KvLayer, ModelSpec
from brim.planner.kv import kv_layers
from brim.planner.mlx_kv import mlx_layers


def speed_shape(spec: ModelSpec, *, engine: str = "llamacpp") -> SpeedShape:
    """The part of a model's description that a speed forecast of an engine reads.

    A description without its active bytes (the toy engine's, an unknown architecture's) counts
    every weight as read.
    """
    stored = mlx_layers(spec) if engine == "mlx" else kv_layers(spec)
    return SpeedShape(
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        num_heads=spec.num_heads,
        num_kv_heads=max(spec.num_kv_heads, default=0),
        key_dim=spec.key_dim,
        vocab_size=spec.vocab_size,
        active_bytes=spec.active_bytes or spec.weights_bytes,
        weights_bytes=spec.weights_bytes,
        active_parameters=spec.active_parameters or spec.num_parameters,
        kv_layers=_layers_read(stored, spec.num_kv_heads),
        num_experts=spec.num_experts,
        num_active_experts=spec.num_active_experts,
        num_recurrent_layers=spec.num_recurrent_layers,
        recurrent_state_bytes=spec.recurrent_state_bytes,
        quant=spec.quant,
        matrix_bytes=spec.matrix_bytes,
    )


def _layers_read(layers: tuple[KvLayer, ...], num_kv_heads: tuple[int, ...]) -> tuple[KvLayer, ...]:
    """The KV that each layer reads for a token, whichever layer stored it.

    A layer that attends but stores nothing (Gemma 3n and 4) reads the cache of the last layer
    before it that looks back as far, so its token costs time though it takes no memory.
    """
    stored: dict[int | None, KvLayer] = {}
    read = []
    for index, layer in enumerate(layers):
        if layer.key_width:
            stored[layer.window_tokens] = layer
        attends = index < len(num_kv_heads) and num_kv_heads[index] > 0
        read.append(stored.get(layer.window_tokens, layer) if attends else layer)
    return tuple(read)
