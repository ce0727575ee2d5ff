"""What a model is, read from its files' headers alone."""

import msgspec


class KvLayer(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """What one layer stores for each token of one sequence."""

    key_width: int
    """Values stored as K: KV heads times head width; with MLA the compressed vector and its rope
    part; 0 for a layer that stores nothing (recurrent, or reading another layer's cache)."""
    value_width: int
    """Values stored as V; 0 where V is a view of K, as with MLA."""
    window_tokens: int | None = None
    """How many tokens the layer looks back; None for all of them."""


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
    kv_layers: tuple[KvLayer, ...] = ()
    """What each layer stores for a token; one for each layer."""
    feed_forward_size: int = 0
    """Width of the widest dense feed-forward; of one expert where all layers have experts."""
    num_experts: int = 0
    """Routed experts of a layer; 0 for a dense model."""
    num_active_experts: int = 0
    """Routed experts that one token uses."""
    active_bytes: int = 0
    """Bytes of weights that one decoded token reads: without a table that only looks rows up, and
    of the routed experts only the share that is used."""
    active_parameters: int = 0
    """Weights behind `active_bytes`: multiply-adds of one token outside attention."""
    matrix_bytes: dict[str, int] = {}
    """Bytes of the matrices that tokens are multiplied with, by tensor type ('Q4_K', 'F16', ...);
    the embedding that only looks rows up, norms and biases are left out."""
    embedding_bytes: int = 0
    """Bytes of the input embedding table, whether or not it is the output matrix as well."""
    is_estimated: bool = False
    """Whether bytes follow from a config and a quant's recipe rather than from the file itself."""
    num_recurrent_layers: int = 0
    recurrent_state_bytes: int = 0
    """What one sequence's state takes over all recurrent layers, however long the sequence is."""
    widths: dict[str, int] = {}
    """Whole numbers of the header that only some architectures have, by GGUF's key without the
    architecture's name ('attention.kv_lora_rank', 'expert_feed_forward_length',
    'ssm.inner_size', ...): what scratch memory depends on beside the fields above."""
    quant: str = ""
    """The recipe's name as the file gives it: F16, Q8_0, Q4_K_M, ..."""
    chat_template: str | None = None
    license: str | None = None
