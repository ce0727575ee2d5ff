"""Draws tokens for a batch of sequences on the device, in the order that SamplingParams states.

The host decides what does not depend on the logits (random numbers, who is penalised for what);
the device does the rest lazily, so that drawn tokens can be fed to the next forward pass before
anybody has read them.  The reference is engine.numpy_sampler; MLX's own random numbers are not
used, because their state is the process's and not the sequence's.
"""

import math
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from brim.core.sampling import SamplingParams
from brim.core.step import Sampled
from brim.engine import numpy_sampler as host
from brim.engine.dry import NO_BREAKERS, DryBreakers
from brim.engine.mlx import adjustments, candidates
from brim.errors import EngineError

SAMPLERS = frozenset(SamplingParams.__struct_fields__)
"""Every field has an effect."""


class Chain(NamedTuple):
    """Which samplers act on a row: rows of one chain share their device operations."""

    top_k: int = 0
    typical: bool = False
    top_p: bool = False
    min_p: bool = False
    xtc: bool = False

    @property
    def is_ranked(self) -> bool:
        """Whether candidates must lie likeliest first; see `numpy_sampler.is_ranked`."""
        return self.top_k > 0 or self.typical or self.top_p or self.xtc


GREEDY = Chain(top_k=1)
"""The likeliest token at any temperature."""


class SequenceSampler:
    """How one sequence draws: its parameters, prepared, and its own random state.

    Args:
        params: Already checked by engine.guards.
        vocab_size: Token ids go from 0 to this, exclusive; logits beyond it are padding.
        eog_tokens: Forbidden when `ignore_eos` is set.
        dry_breakers: Of the model's vocabulary; needed where the parameters ask for DRY.
    """

    def __init__(
        self,
        params: SamplingParams,
        *,
        vocab_size: int,
        eog_tokens: frozenset[int],
        dry_breakers: DryBreakers | None = None,
    ) -> None:
        self.params = params
        self.vocab_size = vocab_size
        self.breakers = dry_breakers.find(params) if dry_breakers else NO_BREAKERS
        biases = host.bias_by_token(params, eog_tokens)
        self.bias = (
            np.fromiter(biases.keys(), np.int32),
            np.fromiter(biases.values(), np.float32),
        )
        self._allowed = self._allowed_bits()
        self._seed = secrets.randbits(64) if params.seed is None else params.seed
        self._chain = self._static_chain()
        self._columns = (
            max(params.temperature, 1e-6),
            params.typical_p,
            params.top_p,
            math.log(params.min_p) if params.min_p > 0 else 0.0,
            params.xtc_threshold,
        )
        self.restart()

    def restart(self) -> None:
        """Begin the random numbers again from the seed."""
        self._rng = np.random.default_rng(self._seed)

    def roll(self) -> tuple[Chain, tuple[float, ...]]:
        """The samplers that act on the next token, and the row of numbers that they take.

        Takes this draw's random numbers: one, and one more where XTC is asked for.
        """
        if self.params.is_greedy:
            return GREEDY, ()
        numbers = host.roll(self.params, self._rng)
        if self._chain == GREEDY:
            return GREEDY, ()
        return self._chain._replace(xtc=numbers.xtc), (numbers.uniform, *self._columns)

    def check_possible(self, mask: bytes | None) -> None:
        """Refuse a draw that bias and mask leave no token for; the device is not asked.

        Raises:
            EngineError: They forbid everything.
        """
        if mask is None and self._allowed is None:
            return
        allowed = self._allowed
        if mask is not None:
            bits = np.frombuffer(mask, np.uint8)
            allowed = bits if allowed is None else bits & allowed
        if not np.any(allowed):
            raise EngineError("mask and logit bias together allow no token at all")

    def _allowed_bits(self) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]] | None":
        """Tokens that the bias does not forbid, as a bit set; None where it forbids none."""
        tokens, values = self.bias
        forbidden = tokens[values == -np.inf]
        if not len(forbidden):
            return None
        allowed = np.ones(self.vocab_size, np.uint8)
        allowed[forbidden] = 0
        return np.packbits(allowed, bitorder="little")

    def _static_chain(self) -> Chain:
        params = self.params
        if params.is_greedy or params.top_k == 1:
            return GREEDY
        return Chain(
            top_k=min(params.top_k, self.vocab_size),
            typical=params.typical_p < 1.0,
            top_p=params.top_p < 1.0,
            min_p=params.min_p > 0.0,
        )


@dataclass(frozen=True, slots=True)
class Draw:
    """One row of a batch: who draws, after what, and from which tokens."""

    sampler: SequenceSampler
    history: Sequence[int]
    """Everything that was fed to the sequence, the token behind this row's logits included."""
    mask: bytes | None = None
    """As in `Feed.mask`, and as long as guards.check_step demands."""


class _Logprobs(NamedTuple):
    """Logprobs of the rows that asked for them, on the device."""

    rows: list[int]
    chosen: mx.array
    """Shape (A, 1)."""
    ids: mx.array
    top: mx.array
    """The likeliest, shape (A, most that any row asked for)."""


class Drawn:
    """Tokens that were drawn, on the device until `results` reads them."""

    def __init__(
        self,
        rows: Sequence[Draw],
        tokens: mx.array,
        is_finite: mx.array,
        logprobs: _Logprobs | None,
    ) -> None:
        self._params = [row.sampler.params for row in rows]
        self._is_finite = is_finite
        self._logprobs = logprobs
        self.tokens = tokens
        """int32, shape (R,): can be fed to the next forward pass unread."""
        self.arrays: list[mx.array] = [tokens, is_finite]
        """All that must be evaluated before `results`."""
        if logprobs is not None:
            self.arrays += [logprobs.chosen, logprobs.ids, logprobs.top]

    def results(self, seq_ids: Sequence[int]) -> list[Sampled]:
        """Wait for the device once, and read what was drawn.

        Args:
            seq_ids: The sequence of each row.

        Raises:
            EngineError: The model computed nothing that can be drawn from.
        """
        mx.eval(self.arrays)
        for seq_id, is_finite in zip(seq_ids, np.array(self._is_finite), strict=True):
            if not is_finite:
                raise EngineError(
                    f"mlx: the logits of sequence {seq_id} are not numbers; the model's weights or "
                    "its KV are damaged, or its float type is too small for it"
                )
        tokens: list[int] = np.array(self.tokens).tolist()
        drawn = [Sampled(s, t) for s, t in zip(seq_ids, tokens, strict=True)]
        if self._logprobs is not None:
            self._add_logprobs(drawn, self._logprobs)
        return drawn

    def _add_logprobs(self, drawn: list[Sampled], logprobs: _Logprobs) -> None:
        chosen, ids, top = (
            np.array(array).tolist() for array in (logprobs.chosen, logprobs.ids, logprobs.top)
        )
        for index, row in enumerate(logprobs.rows):
            num_top = self._params[row].num_logprobs or 0
            likeliest = tuple(zip(ids[index][:num_top], top[index][:num_top], strict=True))
            drawn[row] = Sampled(drawn[row].seq_id, drawn[row].token, chosen[index][0], likeliest)


def draw(logits: mx.array, rows: Sequence[Draw]) -> Drawn:
    """Draw a token for each row; nothing is evaluated yet.

    Takes each sampler's next random numbers, so it is called once a token.

    Args:
        logits: The model's, in its own float type, shape (R, V).
        rows: One for each row of `logits`, which `check_possible` has let through.
    """
    scores = logits[:, : rows[0].sampler.vocab_size].astype(mx.float32)
    scores = adjustments.add_biases(scores, [row.sampler.bias for row in rows])
    scores = adjustments.apply_masks(scores, [row.mask for row in rows])
    penalised = adjustments.penalise(
        scores,
        [
            adjustments.penalties_of(row.history, row.sampler.params, row.sampler.breakers)
            for row in rows
        ],
    )
    tokens = _choose(penalised, [row.sampler.roll() for row in rows])
    reached = mx.take_along_axis(penalised, tokens[:, None], axis=-1)[:, 0]
    return Drawn(rows, tokens, mx.isfinite(reached), _logprobs(scores, tokens, rows))


def _choose(scores: mx.array, rolled: Sequence[tuple[Chain, tuple[float, ...]]]) -> mx.array:
    """One token a row, int32, shape (R,)."""
    groups: dict[Chain, list[int]] = {}
    for row, (chain, _) in enumerate(rolled):
        groups.setdefault(chain, []).append(row)
    parts = []
    for chain, rows in groups.items():
        of_group = scores if len(groups) == 1 else scores[mx.array(rows)]
        parts.append(_choose_alike(of_group, chain, [rolled[row][1] for row in rows]))
    if len(parts) == 1:
        return parts[0]
    order = np.argsort([row for rows in groups.values() for row in rows])
    return mx.concatenate(parts)[mx.array(order)]


def _choose_alike(scores: mx.array, chain: Chain, numbers: Iterable[tuple[float, ...]]) -> mx.array:
    """One token a row where all rows have the same samplers, with values of their own."""
    if chain == GREEDY:
        return scores.argmax(axis=-1).astype(mx.int32)
    columns = mx.array(np.array(list(numbers), np.float32))
    uniform, temperature = columns[:, :1], columns[:, 1:2]
    left = survivors(scores, chain, columns)
    if left.ids is None:
        return candidates.pick_any(left.scores, temperature, uniform)[:, 0]
    return candidates.pick_ranked(left.ids, left.scores, temperature, uniform)[:, 0]


def survivors(scores: mx.array, chain: Chain, columns: mx.array) -> candidates.Candidates:
    """What the truncations of a chain leave of each row.

    Args:
        scores: float32, shape (R, V), after penalties.
        chain: Not greedy.
        columns: What `SequenceSampler.roll` gave, float32, shape (R, 6).
    """
    _, _, typical_p, top_p, log_min_p, xtc_threshold = columns.split(6, axis=-1)
    ids = None
    if chain.is_ranked:
        ids, scores = candidates.rank(scores, chain.top_k or None)
    if chain.typical:
        scores = candidates.keep_typical(scores, typical_p)
    if chain.top_p:
        scores = candidates.keep_top_p(scores, top_p)
    if chain.min_p:
        scores = candidates.keep_min_p(scores, log_min_p)
    if chain.xtc:
        scores = candidates.drop_top_choices(scores, xtc_threshold)
    return candidates.Candidates(ids, scores)


def _logprobs(scores: mx.array, tokens: mx.array, rows: Sequence[Draw]) -> _Logprobs | None:
    """Logprobs after bias and mask, for the rows that ask; None where none does."""
    asked = [row for row, d in enumerate(rows) if d.sampler.params.num_logprobs is not None]
    if not asked:
        return None
    if len(asked) < len(rows):
        index = mx.array(asked)
        scores, tokens = scores[index], tokens[index]
    total = mx.logsumexp(scores, axis=-1, keepdims=True)
    chosen = mx.take_along_axis(scores, tokens[:, None], axis=-1) - total
    num_top = max(rows[row].sampler.params.num_logprobs or 0 for row in asked)
    ids, top = candidates.rank(scores, num_top) if num_top else (tokens[:, None], scores[:, :1])
    return _Logprobs(asked, chosen, ids, top - total)
