"""What one layer of a model computes, as far as scratch memory depends on it: widths and order.

`architectures` reads these from a model's description, `graph` builds llama.cpp's graph of them.
"""

from enum import Enum
from typing import NamedTuple


class Latent(NamedTuple):
    """Multi-head latent attention: K and V of all heads are compressed into one vector."""

    query_rank: int
    """0 where the query is not compressed."""
    kv_rank: int
    rope_dim: int
    key_dim: int
    """Of one head before it is compressed."""
    value_dim: int


class Attention(NamedTuple):
    """One attending layer."""

    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    has_window: bool = False
    is_fused: bool = False
    """Whether one matrix gives Q, K and V, which are then views of its result."""
    is_gated: bool = False
    """Whether Q comes with a gate of the same size for the result."""
    has_positions: bool = True
    """Whether Q and K are rotated by their position; the rotated ones are copies."""
    norms_value: bool = False
    stores_kv: bool = True
    """False for a layer that reads an earlier one's cache."""
    latent: Latent | None = None


class FeedForward(NamedTuple):
    """One feed-forward; experts where there are any."""

    width: int
    is_gated: bool = True
    is_fused: bool = False
    """Whether one matrix gives gate and up."""
    num_experts: int = 0
    num_active_experts: int = 0
    shared_width: int = 0
    """Of the experts that every token uses, together."""
    has_bias: bool = False


class Mamba(NamedTuple):
    """One recurrent layer of Mamba's kind, first or second version."""

    inner: int
    state: int
    kernel: int
    step_rank: int
    num_groups: int
    """0 for the first version."""


class DeltaNet(NamedTuple):
    """One layer of gated linear attention."""

    num_key_heads: int
    num_value_heads: int
    head_dim: int
    kernel: int
    repeats_keys: bool
    """Whether Q and K are copied for each value head."""

    @property
    def channels(self) -> int:
        """Values that go through the convolution."""
        return (2 * self.num_key_heads + self.num_value_heads) * self.head_dim


class ShortConvolution(NamedTuple):
    """One gated convolution over the last few tokens."""

    kernel: int


Recurrent = Mamba | DeltaNet | ShortConvolution


class Layer(NamedTuple):
    """What one layer computes: attention, a recurrence or both, then a feed-forward."""

    attention: Attention | None = None
    recurrent: Recurrent | None = None
    feed_forward: FeedForward | None = None
    is_parallel: bool = False
    """Whether the feed-forward reads what attention reads, rather than its result."""


class OutputCut(Enum):
    """Where the rows that nobody asked logits of are dropped."""

    LAST_LAYER = "before the last layer's sums"
    STREAM = "before the last norm, with the whole stream kept for a draft head"
    NORMED = "after the last norm, which is kept for a draft head"


class GraphModel(NamedTuple):
    """A model as its graph sees it."""

    hidden: int
    vocab: int
    layers: tuple[Layer, ...]
    widest_value: int
    """V values that a token stores in the layer with the most of them."""
    adds_to_stream: bool = False
    """Whether a layer's sums take over the residual stream rather than what is added to it."""
    output_cut: OutputCut = OutputCut.LAST_LAYER
    per_layer_width: int = 0
    """Of embeddings that each layer adds (Gemma 3n, 4)."""
    num_layers: int = 0
    """Of the whole model, where `layers` is a sample of them."""


class Batch(NamedTuple):
    """How much one micro-batch carries."""

    num_rows: int
    num_outputs: int
    num_cells: int
    """KV cells of the layers that look back without end."""
    num_window_cells: int
    num_sequences: int
    flash_attention: bool
    rotate_k: bool
    """Whether K is rotated before it is stored, which evens out the error of quantising."""
    rotate_v: bool
