"""The MLX engine: mlx-lm's model classes behind the engine contract.

Every sequence has caches of its own, sized to what it was admitted for.  A step reads prompt pieces
one sequence after the other, then feeds the last token of every sequence that draws in one pass.
Tokens are drawn on the device, and the next pass is launched before they are read (decode.py).
One thread, which called `load`, owns the stream.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from brim.core.memory import Footprint
from brim.core.plan import Plan
from brim.core.sampling import SamplingParams
from brim.core.step import Feed, StepPlan, StepResult
from brim.engine import guards, kv_block
from brim.engine.base import Allocate, Capabilities, Engine, OnProgress
from brim.engine.dry import DryBreakers
from brim.engine.mlx import attention, library, limits, loading
from brim.engine.mlx.caches import CacheMaker
from brim.engine.mlx.decode import Decoder
from brim.engine.mlx.kv_cache import KV_BITS, padded_tokens
from brim.engine.mlx.sampler import SAMPLERS, Draw, Drawn, SequenceSampler, draw
from brim.engine.mlx.self_check import check
from brim.engine.mlx.sequence import MlxSequence
from brim.engine.mlx.tokenizer import HfTokenizer
from brim.errors import BrimError, Busy, DoesNotFit, EngineError, StoreError
from brim.planner.kv import BLOCK_TOKENS

VERSION = f"mlx-{version('mlx')} mlx-lm-{library.version()}"


class MlxEngine(Engine):
    """See the module's docstring and base.py."""

    _is_loaded = False

    def load(self, plan: Plan, on_progress: OnProgress | None = None) -> None:
        _check_plan(plan)
        with _backend_errors():
            limits.set_limits(plan)
            attention.install()
            directory = loading.find_directory(plan.model.paths)
            # Before the weights: what is wrong with it shows in a moment, and they take minutes.
            tokenizer = HfTokenizer.from_directory(directory, plan.model.vocab_size)
            loaded = loading.load(plan, on_progress)
            caches = CacheMaker(loaded.model, kv_type=plan.kv_type_k)
            decoder = Decoder(loaded.model)
            self._is_exact = check(decoder, caches)
        # Only now, so that an engine that failed to load holds no weights.
        self._decoder, self._caches = decoder, caches
        self._plan, self._num_cells = plan, plan.kv_tokens
        self._weights_bytes = loaded.weights_bytes
        self._tokenizer = tokenizer
        self._dry_breakers = DryBreakers(tokenizer)
        self._sequences: dict[int, MlxSequence] = {}
        self._submitted: StepPlan | None = None
        self._drawn: Drawn | None = None
        self._logits: mx.array | None = None
        self._is_aborted = False
        self._num_steps = 0
        self._identity = f"{plan.model.fingerprint} {VERSION} kv={plan.kv_type_k}"
        self._is_loaded = True
        limits.trim()

    def shutdown(self) -> None:
        if not self._is_loaded:
            return
        self._is_loaded = False
        self._decoder.reset()
        self._sequences.clear()
        self._logits = self._drawn = None
        del self._decoder, self._caches
        limits.trim()

    @property
    def capabilities(self) -> Capabilities:
        maker = self._caches
        return Capabilities(
            can_truncate=maker.can_truncate,
            can_fork_prefix=maker.can_fork_prefix,
            forks_share_kv=False,
            can_export_range=maker.can_truncate,
            can_shift=False,
            batches_sequences=self._decoder.form is not None,
            can_resize_kv=True,
            maps_weights=False,
            kv_types=frozenset({"f16", *(KV_BITS if maker.can_quantise else ())}),
            samplers=SAMPLERS,
            # A few rows may well be equal on Metal; nobody has shown that all are.
            exact_profile=self._is_exact and not limits.is_on_gpu(),
        )

    @property
    def tokenizer(self) -> HfTokenizer:
        return self._tokenizer

    def footprint(self) -> Footprint:
        kv_bytes = sum(sequence.caches.nbytes for sequence in self._sequences.values())
        return limits.footprint(self._plan, self._weights_bytes, kv_bytes)

    # --- sequences -----------------------------------------------------------------------------

    def open(self, sampling: SamplingParams, max_tokens: int | None = None) -> int:
        vocab_size = self._tokenizer.vocab_size
        guards.check_sampling(sampling, SAMPLERS, vocab_size)
        seq_id = guards.free_slot(self._sequences, self._plan.max_sequences)
        sampler = SequenceSampler(
            sampling,
            vocab_size=vocab_size,
            eog_tokens=self._tokenizer.eog_tokens,
            dry_breakers=self._dry_breakers,
        )
        bound = None if max_tokens is None else min(max_tokens, self._plan.context_tokens)
        sequence = self._sequences[seq_id] = MlxSequence(sampler, self._caches.new(bound), bound)
        try:
            with _backend_errors():
                self._compact(self._num_cells)
        except EngineError:
            del self._sequences[seq_id]
            raise
        sequence.fed_in_step = self._num_steps
        return seq_id

    def close(self, seq_id: int) -> None:
        sequence = guards.known(self._sequences, seq_id)
        del self._sequences[seq_id]
        # A pass that went ahead and failed is nobody's now; whom else it harmed learns in a step.
        with contextlib.suppress(Exception):
            self._decoder.forget(sequence.caches)

    def num_tokens(self, seq_id: int) -> int:
        return len(guards.known(self._sequences, seq_id).tokens)

    def fork(self, source: int, target: int, num_tokens: int) -> None:
        src, dst = self._known(source), self._known(target)
        guards.check_fork(len(src.tokens), len(dst.tokens), num_tokens)
        if num_tokens == 0:
            return
        guards.check_room(num_tokens, self._num_free, Busy)
        with _backend_errors():
            self._decoder.release(src.caches)
            self._decoder.release(dst.caches)
            if not src.caches.can_cut(num_tokens):
                owner = f"mlx: the state of {self._plan.model.architecture}"
                guards.check_whole(len(src.tokens), num_tokens, owner)
            dst.caches = src.caches.fork(num_tokens, dst.max_tokens)
        dst.tokens = src.tokens[:num_tokens]

    def truncate(self, seq_id: int, num_tokens: int) -> None:
        sequence = self._known(seq_id)
        guards.check_truncate(len(sequence.tokens), num_tokens)
        with _backend_errors():
            self._decoder.release(sequence.caches)
            if not sequence.caches.can_cut(num_tokens):
                architecture = self._plan.model.architecture
                raise EngineError(
                    f"mlx: the state of {architecture} cannot be cut to {num_tokens} tokens"
                )
            if num_tokens < len(sequence.tokens):
                sequence.caches.truncate(num_tokens)
        del sequence.tokens[num_tokens:]
        sequence.sampler.restart()

    def can_keep(self, seq_id: int, num_tokens: int) -> bool:
        return super().can_keep(seq_id, num_tokens) or (
            num_tokens < self.num_tokens(seq_id) and self._known(seq_id).caches.can_cut(num_tokens)
        )

    def move(self, source: int, target: int) -> None:
        """See the base class; the buffers change hands, and grow once if the target needs more.

        A pass that went ahead stays good: it depends on the tokens, not on who draws them.
        """
        src, dst = self._known(source), self._known(target)
        guards.check_fork(len(src.tokens), len(dst.tokens), len(src.tokens))
        if source == target:
            raise EngineError(f"sequence {source} cannot be moved to itself")
        with _backend_errors():
            self._decoder.forget(dst.caches)
        src.caches.expect(dst.max_tokens)
        dst.caches, dst.tokens = src.caches, src.tokens
        del self._sequences[source]

    def shift(self, seq_id: int, num_kept: int, num_dropped: int) -> None:
        guards.check_shift(len(self._known(seq_id).tokens), num_kept, num_dropped)
        raise EngineError("mlx: keys hold their positions, so a sequence cannot be shifted")

    @property
    def kv_identity(self) -> str:
        return self._identity

    def export_kv(
        self,
        seq_id: int,
        start: int = 0,
        end: int | None = None,
        *,
        allocate: Allocate | None = None,
    ) -> memoryview:
        sequence = self._known(seq_id)
        length = len(sequence.tokens)
        end = guards.check_range(length, start, end)
        if not self._caches.can_truncate:
            guards.check_whole_range(length, start, end, "mlx: KV of this model")
        caches = sequence.caches
        with _backend_errors():
            self._decoder.release(caches)
            return kv_block.write(
                self._identity,
                sequence.tokens[start:end],
                caches.export_size(start, end),
                lambda address, size: caches.export_into(address, size, start, end),
                start=start,
                allocate=allocate,
            )

    def import_kv(self, seq_id: int, blob: bytes | memoryview) -> None:
        sequence = self._known(seq_id)
        block = kv_block.read(self._identity, blob)
        kv_block.check_place(block, len(sequence.tokens), self._plan.context_tokens)
        if block.start > 0 and not self._caches.can_truncate:
            raise StoreError("mlx: KV of this model is kept whole, and this is a part")
        guards.check_room(len(block.tokens), self._num_free, DoesNotFit)
        with _backend_errors():
            self._decoder.release(sequence.caches)
            sequence.caches.import_from(block.state, block.start + len(block.tokens))
        sequence.tokens += block.tokens

    def resize_kv(self, num_tokens: int) -> None:
        """Sequences own their memory, so a pool is only a bound.

        What sequences took beyond it, and what was freed, goes back now.
        """
        guards.check_resize(self._num_used, num_tokens)
        try:
            self._compact(num_tokens)
            limits.set_pool(self._plan, num_tokens)
            limits.trim()
        except Exception as exc:
            raise DoesNotFit(
                f"no KV pool of {num_tokens} tokens (mlx: {exc}); it keeps its {self._num_cells}"
            ) from exc
        self._num_cells = num_tokens

    # --- steps ---------------------------------------------------------------------------------

    def submit(self, plan: StepPlan) -> None:
        lengths = {seq_id: len(s.tokens) for seq_id, s in self._sequences.items()}
        guards.check_step(plan, self._plan, lengths, self._tokenizer.vocab_size, self._submitted)
        guards.check_room(plan.num_scheduled_tokens, self._num_free, Busy)
        for feed in plan.feeds:
            sequence = self._known(feed.seq_id)
            if feed.sample:
                # Recurrent states could not be taken back once it is fed.
                sequence.sampler.check_possible(feed.mask)
        for sequence in self._sequences.values():
            sequence.row = None
        self._is_aborted = False
        self._num_steps += 1
        with self._taken_back(plan, lengths):
            for feed in plan.feeds:
                self._known(feed.seq_id).fed_in_step = self._num_steps
                self._read(feed)
            self._drawn = self._draw([feed for feed in plan.feeds if feed.sample])
        self._submitted = plan

    def collect(self) -> StepResult:
        plan, self._submitted = guards.submitted(self._submitted), None
        drawing = [feed for feed in plan.feeds if feed.sample]
        lengths = {
            feed.seq_id: len(self._sequences[feed.seq_id].tokens) - len(feed.tokens)
            for feed in plan.feeds
        }
        with self._taken_back(plan, lengths):
            if self._drawn is None:
                self._decoder.wait()
                return StepResult([])
            sampled = self._drawn.results([feed.seq_id for feed in drawing])
            self._decoder.wait()
            # Where every answer has ended, nobody will feed what was built.
            if any(one.token not in self._tokenizer.eog_tokens for one in sampled):
                self._decoder.start_ahead(
                    {self._sequences[one.seq_id].caches: one.token for one in sampled}
                )
        return StepResult(sampled)

    def request_abort(self) -> None:
        self._is_aborted = True

    def logits(self, seq_id: int) -> NDArray[np.float32]:
        row = guards.known(self._sequences, seq_id).row
        if row is None or self._logits is None:
            raise EngineError(f"sequence {seq_id} has no logits: its last step did not sample")
        return np.array(self._logits[row].astype(mx.float32))

    # --- inside --------------------------------------------------------------------------------

    def _known(self, seq_id: int) -> MlxSequence:
        sequence = guards.known(self._sequences, seq_id)
        if sequence.is_broken:
            raise EngineError(f"sequence {seq_id} was lost in a step that failed; close it")
        return sequence

    @property
    def _num_used(self) -> int:
        return sum(len(sequence.tokens) for sequence in self._sequences.values())

    @property
    def _num_free(self) -> int:
        return self._num_cells - self._num_used

    def _compact(self, num_cells: int) -> None:
        """Have sequences take memory for no more than so many tokens, if they hold no more.

        Each took, or will take, as much as it was opened for, also where it ended long before.
        Those that were not fed for longest give back what they do not hold; one that goes on after
        all takes it again.
        """
        sequences = [each for each in self._sequences.values() if not each.is_broken]
        num_over = sum(each.num_cells for each in sequences) - num_cells
        # Cells come in blocks, of which each sequence may fill one in part.
        num_over -= BLOCK_TOKENS * len(sequences)
        for sequence in sorted(sequences, key=lambda each: each.fed_in_step):
            if num_over <= 0:
                return
            num_spare = sequence.num_cells - padded_tokens(len(sequence.tokens))
            if sequence.tokens and num_spare > 0:
                self._decoder.release(sequence.caches)
                sequence.caches = sequence.caches.compacted()
                num_over -= num_spare

    def _read(self, feed: Feed) -> None:
        """Feed all tokens but the one behind which a token is drawn, in bounded evaluations."""
        sequence = self._sequences[feed.seq_id]
        tokens = feed.tokens[:-1] if feed.sample else feed.tokens
        start = 0
        while start < len(tokens):
            self._check_aborted()
            num_rows = limits.rows_of_evaluation(
                self._plan.model,
                len(sequence.tokens),
                len(tokens) - start,
                kv_type=self._plan.kv_type_k,
            )
            piece = tokens[start : start + num_rows]
            self._decoder.read(sequence.caches, piece)
            sequence.tokens.extend(piece)
            start += num_rows

    def _draw(self, feeds: Sequence[Feed]) -> Drawn | None:
        """Feed the last token of every sequence that draws, draw, and launch what comes next."""
        if not feeds:
            return None
        self._check_aborted()
        sequences = [self._sequences[feed.seq_id] for feed in feeds]
        last = [feed.tokens[-1] for feed in feeds]
        logits = self._decoder.decode([sequence.caches for sequence in sequences], last)
        rows = []
        for row, (sequence, feed) in enumerate(zip(sequences, feeds, strict=True)):
            sequence.tokens.append(feed.tokens[-1])
            sequence.row = row
            rows.append(Draw(sequence.sampler, sequence.tokens, feed.mask))
        self._logits = logits
        drawn = draw(logits, rows)
        mx.async_eval(drawn.arrays)
        self._build_ahead(sequences, drawn.tokens)
        return drawn

    def _build_ahead(self, sequences: Sequence[MlxSequence], tokens: mx.array) -> None:
        """Go on with every sequence that may be fed another token."""
        window = self._plan.context_tokens
        rows = [
            row
            for row, sequence in enumerate(sequences)
            if len(sequence.tokens)
            < (window if sequence.max_tokens is None else sequence.max_tokens)
        ]
        if not rows:
            return
        if len(rows) < len(sequences):
            tokens = tokens[mx.array(rows)]
        self._decoder.build_ahead([sequences[row].caches for row in rows], tokens)

    def _check_aborted(self) -> None:
        if self._is_aborted:
            raise EngineError("mlx: the step was aborted")

    @contextlib.contextmanager
    def _taken_back(self, plan: StepPlan, lengths: Mapping[int, int]) -> Iterator[None]:
        """Undo a step that fails; a sequence for which that cannot be done is lost."""
        try:
            with _backend_errors():
                yield
        except BrimError:
            self._decoder.reset()
            for feed in plan.feeds:
                self._sequences[feed.seq_id].row = None
            # Others may have been in the pass that went ahead.
            for seq_id, sequence in self._sequences.items():
                _shorten(sequence, lengths.get(seq_id, len(sequence.tokens)))
            raise


def _shorten(sequence: MlxSequence, num_tokens: int) -> None:
    """Take a sequence back to its first tokens, or mark it as lost."""
    del sequence.tokens[num_tokens:]
    try:
        if sequence.caches.num_tokens != num_tokens:
            sequence.caches.truncate(num_tokens)
        # What failed within one layer is part of every later layer's buffer, however it is cut.
        mx.eval(sequence.caches.arrays())
    except Exception:
        sequence.is_broken = True


@contextlib.contextmanager
def _backend_errors() -> Iterator[None]:
    """Turn whatever MLX or mlx-lm raises into an error that names the engine."""
    try:
        yield
    except BrimError:
        raise
    except Exception as exc:
        raise EngineError(f"mlx: {type(exc).__name__}: {exc}") from exc


def _check_plan(plan: Plan) -> None:
    """Refuse plans that MLX would silently do otherwise."""
    if plan.kv_type_k != plan.kv_type_v:
        raise EngineError(
            f"mlx: K and V share one type; the plan has {plan.kv_type_k} and {plan.kv_type_v}"
        )
