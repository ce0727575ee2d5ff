"""What of a model decides its speed, taken from its description."""

from brim.core.forecast import SpeedShape
from brim.core.model import ModelSpec


def speed_shape(spec: ModelSpec) -> SpeedShape:
    """The part of a model's description that a speed forecast reads.

    A description without its active bytes (the toy engine's, an unknown architecture's) counts
    every weight as read.
    """
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
        kv_layers=spec.kv_layers,
        num_experts=spec.num_experts,
        num_active_experts=spec.num_active_experts,
        num_recurrent_layers=spec.num_recurrent_layers,
        recurrent_state_bytes=spec.recurrent_state_bytes,
        quant=spec.quant,
        matrix_bytes=spec.matrix_bytes,
    )
