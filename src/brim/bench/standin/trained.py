"""Small models whose weights look trained, for tests of equality.

Random blocks are enough for speed, but their logits are flat and their ties are many.  Here weights
have a decaying spectrum and logits the skew of a trained model's, so that near ties are as rare as
in real use and exact ties (repeated rows) do not occur.  The same seed gives the same weights on
the same numpy.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from brim.bench.standin.dimensions import Dimensions

Matrix = npt.NDArray[np.float32]

TRAINED_PERPLEXITY = 10.0
"""What a small trained model reaches on text like its own; sets the spread of the logits."""


@dataclass(frozen=True)
class Shape:
    """Dimensions of a Llama model; the head is tied to the token embeddings unless `untied`."""

    num_layers: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    feed_forward: int
    vocab_size: int
    context_tokens: int
    untied: bool = False

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer, norms included."""
        attention = 2 * self.hidden * self.head_dim * (self.num_heads + self.num_kv_heads)
        return attention + 3 * self.hidden * self.feed_forward + 2 * self.hidden

    @property
    def parameters(self) -> int:
        """Parameters of the whole model."""
        embeddings = self.vocab_size * self.hidden * (2 if self.untied else 1)
        return embeddings + self.num_layers * self.layer_parameters + self.hidden

    @property
    def dimensions(self) -> Dimensions:
        """What a template needs of it."""
        return Dimensions(
            architecture="llama",
            num_layers=self.num_layers,
            hidden_size=self.hidden,
            vocab_size=self.vocab_size,
            context_tokens=self.context_tokens,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            feed_forward_size=self.feed_forward,
            is_tied=not self.untied,
            rope_freq_base=500_000.0,
        )

    def scaled_to(self, parameters: float) -> "Shape":
        """The same widths with as many layers as bring it nearest to `parameters`."""
        rest = replace(self, num_layers=0).parameters
        return replace(self, num_layers=max(1, round((parameters - rest) / self.layer_parameters)))


LLAMA_1B = Shape(
    num_layers=16,
    hidden=2048,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    feed_forward=8192,
    vocab_size=128_256,
    context_tokens=131_072,
)
"""Llama-3.2-1B's dimensions: the smallest model that people chat with."""

SMALL = Shape(
    num_layers=4,
    hidden=256,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    feed_forward=768,
    vocab_size=4096,
    context_tokens=8192,
    untied=True,
)
"""Divisible by 256, so that K-quants apply, and small enough for a test to load in milliseconds."""

Draw = Callable[[int, int, float], Matrix]
"""(rows, columns, gain) -> weights whose product with a unit-variance vector has variance gain²."""


def plain_draw(rng: np.random.Generator) -> Draw:
    """Independent normal weights: all that a speed measurement needs."""

    def draw(rows: int, columns: int, gain: float) -> Matrix:
        weights = rng.standard_normal((rows, columns), dtype=np.float32)
        return weights * np.float32(gain / math.sqrt(columns))

    return draw


def spectrum_draw(rng: np.random.Generator) -> Draw:
    """Weights with singular values that decay as k^-1/2 over a flat floor, like trained ones.

    The floor keeps every row distinct and the matrix of full rank.
    """

    def draw(rows: int, columns: int, gain: float) -> Matrix:
        rank = min(rows, columns) // 2
        decay = np.arange(1, rank + 1, dtype=np.float32) ** -0.5
        left = rng.standard_normal((rows, rank), dtype=np.float32)
        right = rng.standard_normal((rank, columns), dtype=np.float32)
        floor = rng.standard_normal((rows, columns), dtype=np.float32)
        shaped = np.asarray((left * decay) @ right, dtype=np.float32)
        weights = shaped / shaped.std() + floor
        scale = gain / (math.sqrt(columns) * weights.std())
        return np.asarray(weights * scale, dtype=np.float32)

    return draw


def tensors(
    shape: Shape, rng: np.random.Generator, *, trained_like: bool
) -> Iterator[tuple[str, tuple[int, ...], Callable[[], Matrix]]]:
    """Name, shape (rows, columns) and a maker of every tensor, in the file's order."""
    draw = spectrum_draw(rng) if trained_like else plain_draw(rng)
    width, queries = shape.hidden, shape.num_heads * shape.head_dim
    keys, inner = shape.num_kv_heads * shape.head_dim, shape.feed_forward

    def matrix(rows: int, columns: int, gain: float = 1.0) -> Callable[[], Matrix]:
        return lambda: draw(rows, columns, gain)

    def norm() -> Matrix:
        deviation = rng.standard_normal(width, dtype=np.float32)
        return np.asarray(1 + 0.05 * deviation, dtype=np.float32)

    # Each layer adds two terms to the residual stream; with this gain the embedding stays visible
    # at the end, and with the sharper queries attention looks at few positions, as when trained.
    residual = 1 / math.sqrt(2 * shape.num_layers)
    sharp = 1.5 if trained_like else 1.0
    # Embeddings get unit variance in an element; the tied head of the plain model divides it away.
    embedding = math.sqrt(width) if trained_like else 1.0
    yield "token_embd.weight", (shape.vocab_size, width), matrix(shape.vocab_size, width, embedding)
    for layer in range(shape.num_layers):
        pre = f"blk.{layer}."
        yield pre + "attn_norm.weight", (width,), norm
        yield pre + "attn_q.weight", (queries, width), matrix(queries, width, sharp)
        yield pre + "attn_k.weight", (keys, width), matrix(keys, width, sharp)
        yield pre + "attn_v.weight", (keys, width), matrix(keys, width)
        yield pre + "attn_output.weight", (width, queries), matrix(width, queries, residual)
        yield pre + "ffn_norm.weight", (width,), norm
        yield pre + "ffn_gate.weight", (inner, width), matrix(inner, width)
        yield pre + "ffn_up.weight", (inner, width), matrix(inner, width)
        yield pre + "ffn_down.weight", (width, inner), matrix(width, inner, residual)
    yield "output_norm.weight", (width,), norm
    if shape.untied:
        yield (
            "output.weight",
            (shape.vocab_size, width),
            matrix(shape.vocab_size, width, logit_spread(shape.vocab_size)),
        )


def logit_spread(vocab_size: int) -> float:
    """Standard deviation of normal logits whose softmax has TRAINED_PERPLEXITY, on average.

    Found by halving on drawn logits: ln V - s²/2, the textbook's entropy, holds for a vocabulary
    without end and is far off for a few thousand tokens.
    """
    logits = np.random.default_rng(0).standard_normal((32, vocab_size))
    low, high = 0.0, 2 * math.sqrt(2 * math.log(vocab_size))
    for _ in range(20):
        middle = (low + high) / 2
        weights = np.exp(middle * (logits - logits.max(axis=1, keepdims=True)))
        chances = weights / weights.sum(axis=1, keepdims=True)
        entropy = -np.sum(chances * np.log(chances + 1e-300), axis=1).mean()
        low, high = (middle, high) if entropy > math.log(TRAINED_PERPLEXITY) else (low, middle)
    return low
