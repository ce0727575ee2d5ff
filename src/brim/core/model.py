"""What a model is, read from its files' headers alone."""

import msgspec


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Dimensions and whereabouts of one model; registry makes it, planner and worker read it."""

    name: str
    """What clients call it."""
    paths: tuple[str, ...]
    """The file, or all parts of a split file in order."""
    format: str
    """'gguf', 'safetensors', or 'toy' for the engine without weights."""
    architecture: str
    fingerprint: str
    """Changes when the header or the size of a file changes; not a hash of the weights."""
    num_parameters: int
    weights_bytes: int
    """Bytes of all tensors."""
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: tuple[int, ...]
    """KV heads of each layer; 0 for a layer without attention."""
    key_dim: int
    """Width of one key head."""
    value_dim: int
    vocab_size: int
    trained_context_tokens: int
    feed_forward_size: int = 0
    recurrent_state_bytes: int = 0
    """What one sequence's state takes over all recurrent layers, however long the sequence is."""
    quant: str = ""
    """The recipe's name as the file gives it: F16, Q8_0, Q4_K_M, ..."""
    chat_template: str | None = None
    license: str | None = None
