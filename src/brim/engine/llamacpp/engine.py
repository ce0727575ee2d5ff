"""The llama.cpp engine: llama.h's functions behind the engine contract.

Always mapped, never locked into memory; one unified KV pool that all sequences share; prefill
chunks and decode tokens mixed in one llama_decode; sampling in C.  Everything on which llama.cpp
would abort the process is refused before the call (engine.guards).
"""

import contextlib
import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brim.core.memory import Footprint
from brim.core.plan import Plan
from brim.core.sampling import SamplingParams
from brim.core.step import Feed, Sampled, StepPlan, StepResult
from brim.engine import guards, kv_block
from brim.engine import numpy_sampler as host
from brim.engine.base import Allocate, Capabilities, Engine, OnProgress
from brim.engine.llamacpp import binding, loading, log, self_check
from brim.engine.llamacpp.batch import Batch
from brim.engine.llamacpp.binding import lib
from brim.engine.llamacpp.kv import KvPool
from brim.engine.llamacpp.placement import Placement
from brim.engine.llamacpp.sampler_chain import SAMPLERS, ChainBuilder, forget_history
from brim.engine.llamacpp.threads import StepThreads
from brim.engine.llamacpp.tokenizer import LlamaTokenizer
from brim.errors import BrimError, Busy, DoesNotFit, EngineError, StoreError
from brim.machine.heap import trim_heap

FLASH_TILE_ROWS = 64
"""Query rows that the flash attention of the CPU backend takes as one tile; a step of 48 rows at a
depth of 900 tokens takes longer than one of 64.  Source: GGML_FA_TILE_Q, and measured."""

SMALL_TILE_ROWS = 16
"""Of matrix products: a step of 65 rows costs as much as one of 80."""

CELL_CHECK_S = 1.5e-9
"""Of one thread, for each head of each layer, to see in the mask that a cell is another sequence's:
1.6 ns in steps of one row, 1.0 of eight (10,240 idle cells, 512 heads, x86-64, November 2026;
`make bench-steps`)."""

CELL_READ_S = 12e-9
"""Without flash attention every cell is computed, whoever's it is: 17 ns in steps of one row, 10 of
eight (7,200 idle cells, else as above)."""

_TURNING = "K-shift"
"""What llama.cpp calls the turning of keys, where it failed."""


class LlamaSequence:
    """One open sequence: what was fed, and the C sampler chain that draws for it."""

    __slots__ = (
        "biased", "biases", "chain", "drawn", "num_shared", "row", "sampling", "tokens",
    )  # fmt: skip

    def __init__(self, sampling: SamplingParams, chain: Any, biases: dict[int, float]) -> None:
        self.sampling = sampling
        self.chain = chain
        self.biased = np.fromiter(biases.keys(), np.intp)
        """Tokens with a bias, and `biases` in the same order."""
        self.biases = np.fromiter(biases.values(), np.float32)
        self.tokens: list[int] = []
        self.num_shared = 0
        """Tokens at its beginning whose cells others may hold too; no fewer than are shared."""
        self.row: int | None = None
        """Row of the last step that holds this sequence's logits."""
        self.drawn: int | None = None
        """Token drawn last and not fed yet; the chain's penalties have seen it already."""


class LlamaCppEngine(Engine):
    """See the module's docstring and base.py."""

    _model: Any = None
    _context: Any = None
    _chains: ChainBuilder

    def load(self, plan: Plan, on_progress: OnProgress | None = None) -> None:
        binding.check_layout()
        loading.check_plan(plan)
        log.install()
        lib.llama_backend_init()
        self._plan = plan
        self._sequences: dict[int, LlamaSequence] = {}
        self._submitted: StepPlan | None = None
        self._abort_flag = ctypes.create_string_buffer(2)
        self._batch = Batch(plan.max_batch_tokens)
        self._threads = StepThreads(lib, plan, Placement(plan.num_batch_threads))
        with log.captured() as lines:
            self._model = loading.load_model(plan, on_progress)
        self._model_lines = lines
        self._vocab = lib.llama_model_get_vocab(self._model)
        self._create_context(plan.kv_tokens)
        loading.check_generates(self._model, self._context, plan)
        self._tokenizer = LlamaTokenizer(self._vocab)
        self._chains = ChainBuilder(
            self._vocab,
            vocab_size=self._tokenizer.vocab_size,
            eog_tokens=self._tokenizer.eog_tokens,
            window=plan.context_tokens,
        )
        self._kv_identity = (
            f"{plan.model.fingerprint} llama-cpp-python-{binding.VERSION} "
            f"k={plan.kv_type_k} v={plan.kv_type_v} fa={int(plan.flash_attention)}"
        )
        self._capabilities = self._checked_capabilities()

    def shutdown(self) -> None:
        for seq_id in list(getattr(self, "_sequences", {})):
            lib.llama_sampler_free(self._sequences.pop(seq_id).chain)
        if hasattr(self, "_chains"):
            self._chains.free()
        self._free_context()
        if hasattr(self, "_threads"):
            self._threads.release()
        if self._model is not None:
            lib.llama_model_free(self._model)
            self._model = None

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    @property
    def tokenizer(self) -> LlamaTokenizer:
        return self._tokenizer

    def footprint(self) -> Footprint:
        return self._footprint

    # --- sequences -----------------------------------------------------------------------------

    def open(self, sampling: SamplingParams, max_tokens: int | None = None) -> int:
        guards.check_sampling(sampling, SAMPLERS, self._tokenizer.vocab_size)
        seq_id = guards.free_slot(self._sequences, self._plan.max_sequences)
        biases = host.bias_by_token(sampling, self._tokenizer.eog_tokens)
        self._sequences[seq_id] = LlamaSequence(sampling, self._chains.build(sampling), biases)
        return seq_id

    def close(self, seq_id: int) -> None:
        sequence = guards.known(self._sequences, seq_id)
        self._pool.drop(seq_id)
        lib.llama_sampler_free(sequence.chain)
        del self._sequences[seq_id]

    def num_tokens(self, seq_id: int) -> int:
        return len(guards.known(self._sequences, seq_id).tokens)

    def fork(self, source: int, target: int, num_tokens: int) -> None:
        src, dst = (guards.known(self._sequences, seq_id) for seq_id in (source, target))
        guards.check_fork(len(src.tokens), len(dst.tokens), num_tokens)
        if num_tokens == 0:
            return
        if not self.can_keep(source, num_tokens):
            owner = f"llama.cpp: the state of {self._plan.model.architecture}"
            guards.check_whole(len(src.tokens), num_tokens, owner)
        self._pool.share(source, target, num_tokens if num_tokens < len(src.tokens) else None)
        self._check_length(target, num_tokens)
        src.num_shared = max(src.num_shared, num_tokens)
        dst.num_shared = num_tokens
        dst.tokens = src.tokens[:num_tokens]
        self._accept(dst, dst.tokens)

    def truncate(self, seq_id: int, num_tokens: int) -> None:
        sequence = guards.known(self._sequences, seq_id)
        guards.check_truncate(len(sequence.tokens), num_tokens)
        if num_tokens < len(sequence.tokens):
            if not self.can_keep(seq_id, num_tokens):
                raise EngineError(
                    f"llama.cpp: the state of {self._plan.model.architecture} cannot be cut to "
                    f"{num_tokens} tokens"
                )
            if not self._pool.cut(seq_id, num_tokens):
                raise EngineError(f"llama.cpp: cannot cut sequence {seq_id} to {num_tokens} tokens")
            del sequence.tokens[num_tokens:]
            sequence.num_shared = min(sequence.num_shared, num_tokens)
        self._restart_chain(sequence)

    def can_keep(self, seq_id: int, num_tokens: int) -> bool:
        if super().can_keep(seq_id, num_tokens):
            return True
        # Layers with a window still have what the cut would look back to, or have not.
        is_part = 0 < num_tokens < len(self._sequences[seq_id].tokens)
        return is_part and self._abilities.can_part and self._pool.can_keep(seq_id, num_tokens)

    def shift(self, seq_id: int, num_kept: int, num_dropped: int) -> None:
        sequence = guards.known(self._sequences, seq_id)
        guards.check_shift(len(sequence.tokens), num_kept, num_dropped)
        if not self._capabilities.can_shift:
            raise EngineError(
                f"llama.cpp: {self._plan.model.architecture} with keys in {self._plan.kv_type_k} "
                "cannot be shifted; trim the prompt instead"
            )
        behind = num_kept + num_dropped
        if behind < self._num_shared(seq_id):
            self._detach(seq_id, behind)
        self._pool.close_gap(seq_id, num_kept, num_dropped)
        del sequence.tokens[num_kept:behind]
        sequence.num_shared = min(sequence.num_shared, num_kept)
        self._turn_keys(seq_id)
        # Not the random state: an answer goes on across a shift.
        sequence.drawn = None
        forget_history(sequence.chain)
        self._accept(sequence, sequence.tokens)

    @property
    def kv_identity(self) -> str:
        return self._kv_identity

    def export_kv(
        self,
        seq_id: int,
        start: int = 0,
        end: int | None = None,
        *,
        allocate: Allocate | None = None,
    ) -> memoryview:
        sequence = guards.known(self._sequences, seq_id)
        length = len(sequence.tokens)
        end = guards.check_range(length, start, end)
        if not self._capabilities.can_export_range:
            guards.check_whole_range(length, start, end, "llama.cpp: KV of this model")
        with contextlib.ExitStack() as stack:
            if end - start < length:
                stack.enter_context(self._pool.narrowed(seq_id, start, end, self._spare()))
            size, fill = self._pool.state_of(seq_id)
            return kv_block.write(
                self._kv_identity,
                sequence.tokens[start:end],
                size,
                fill,
                start=start,
                allocate=allocate,
            )

    def import_kv(self, seq_id: int, blob: bytes | memoryview) -> None:
        sequence = guards.known(self._sequences, seq_id)
        block = kv_block.read(self._kv_identity, blob)
        start, end = block.start, block.start + len(block.tokens)
        kv_block.check_place(block, len(sequence.tokens), self._plan.context_tokens)
        if start == 0:
            self._pool.restore(seq_id, block.state, start, end)
        elif self._capabilities.can_export_range:
            self._pool.append(seq_id, block.state, start, end, self._spare())
        else:
            raise StoreError("llama.cpp: KV of this model is kept whole, and this is a part")
        sequence.tokens += block.tokens
        if sequence.drawn is None:
            self._accept(sequence, block.tokens)
        else:
            self._restart_chain(sequence)

    def resize_kv(self, num_tokens: int) -> None:
        """Move all sequences through a mapped file into a new context.

        The old context is freed before the new one is made: a resize is asked for when memory is
        short, and both at once would be the peak that it is meant to prevent.
        """
        guards.check_resize(0, num_tokens)
        before = self._num_cells
        state = self._save_all()
        try:
            self._move_to_pool(num_tokens, state)
        except BrimError as exc:
            try:
                self._move_to_pool(before, state)
            except BrimError as fatal:
                # Nothing can be stepped any more; a context that is not there must not be touched.
                self.shutdown()
                raise EngineError(f"{fatal.message}; the model must be loaded again") from exc
            raise DoesNotFit(
                f"no KV pool of {num_tokens} tokens for the open sequences ({exc.message}); "
                f"it keeps its {before}"
            ) from exc

    # --- steps ---------------------------------------------------------------------------------

    def submit(self, plan: StepPlan) -> None:
        lengths = {seq_id: len(s.tokens) for seq_id, s in self._sequences.items()}
        guards.check_step(plan, self._plan, lengths, self._tokenizer.vocab_size, self._submitted)
        # llama.cpp's batch is no larger than its pool, and it aborts on more rows than either.
        guards.check_room(plan.num_scheduled_tokens, self._num_batch_rows, Busy)
        batch = self._batch
        batch.clear()
        rows = [
            batch.add(feed.seq_id, feed.tokens, lengths[feed.seq_id], sample=feed.sample)
            for feed in plan.feeds
        ]
        self._abort_flag[0] = b"\0"
        log.forget_errors()
        status = self._threads.decode(self._context, batch.native)
        if status != 0:
            self._undo(plan, lengths)
            raise self._decode_error(status, plan)
        for feed, row in zip(plan.feeds, rows, strict=True):
            sequence = self._sequences[feed.seq_id]
            sequence.tokens.extend(feed.tokens)
            sequence.row = row if feed.sample else None
            self._show_fed(sequence, feed)
        self._submitted = plan

    def collect(self) -> StepResult:
        plan, self._submitted = guards.submitted(self._submitted), None
        return StepResult([self._draw(feed) for feed in plan.feeds if feed.sample])

    def request_abort(self) -> None:
        self._abort_flag[0] = b"\1"

    def logits(self, seq_id: int) -> NDArray[np.float32]:
        row = guards.known(self._sequences, seq_id).row
        if row is None:
            raise EngineError(f"sequence {seq_id} has no logits: its last step did not sample")
        pointer = lib.llama_get_logits_ith(self._context, row)
        return np.ctypeslib.as_array(pointer, (self._tokenizer.vocab_size,))

    # --- inside --------------------------------------------------------------------------------

    def _draw(self, feed: Feed) -> Sampled:
        sequence = self._sequences[feed.seq_id]
        params = sequence.sampling
        if feed.mask is not None:
            logits = self.logits(feed.seq_id)
            logits[~host.allowed_tokens(feed.mask, self._tokenizer.vocab_size)] = -np.inf
            host.check_possible(host.apply_bias(logits, params, self._tokenizer.eog_tokens))
        token = sequence.drawn = self._choose(feed.seq_id, sequence)
        if params.num_logprobs is None:
            return Sampled(feed.seq_id, token)
        biased = host.apply_bias(self.logits(feed.seq_id), params, self._tokenizer.eog_tokens)
        logprob, top = host.top_logprobs(host.logprobs_of(biased), token, params.num_logprobs)
        return Sampled(feed.seq_id, token, logprob, top)

    def _choose(self, seq_id: int, sequence: LlamaSequence) -> int:
        params = sequence.sampling
        if params.needs_history or not params.is_greedy:
            token: int = lib.llama_sampler_sample(sequence.chain, self._context, sequence.row)
            return token
        # The chain would make a list of all tokens first: 163 us of 128,256, against 15 for this.
        logits = self.logits(seq_id)
        if len(sequence.biased) == 0:
            return int(logits.argmax())
        # In place and back again, since a copy of so many touches fresh pages.
        unbiased = logits[sequence.biased]
        logits[sequence.biased] += sequence.biases
        likeliest = int(logits.argmax())
        logits[sequence.biased] = unbiased
        return likeliest

    def _show_fed(self, sequence: LlamaSequence, feed: Feed) -> None:
        """Keep the penalties' history equal to what was fed, whatever was drawn before."""
        drawn, sequence.drawn = sequence.drawn, None
        if not sequence.sampling.needs_history:
            return
        if drawn is None:
            self._accept(sequence, feed.tokens)
        elif drawn == feed.tokens[0]:
            self._accept(sequence, feed.tokens[1:])
        else:
            self._restart_chain(sequence)

    def _restart_chain(self, sequence: LlamaSequence) -> None:
        sequence.drawn = None
        lib.llama_sampler_reset(sequence.chain)
        self._accept(sequence, sequence.tokens)

    def _accept(self, sequence: LlamaSequence, tokens: Sequence[int]) -> None:
        """Show tokens that were not drawn by the chain to its penalties."""
        if not sequence.sampling.needs_history:
            return
        reach = max(sequence.sampling.repeat_last_n, sequence.sampling.dry_penalty_last_n)
        for token in tokens[-reach:] if reach > 0 else ():
            lib.llama_sampler_accept(sequence.chain, token)

    def _undo(self, plan: StepPlan, lengths: dict[int, int]) -> None:
        """After a failed decode some micro-batches may have been stored: cut them off again."""
        for feed in plan.feeds:
            held = lengths[feed.seq_id]
            self._pool.cut(feed.seq_id, held)

    def _decode_error(self, status: int, plan: StepPlan) -> EngineError | Busy:
        rows = plan.num_scheduled_tokens
        if status == 1:
            return Busy(f"the KV pool has no room for {rows} more tokens", retry_after_s=1.0)
        if status == 2:
            return EngineError("llama.cpp: the step was aborted")
        reason = log.last_error()
        return EngineError(f"llama.cpp: decode failed with {status}" + (reason and f": {reason}"))

    def _create_context(self, num_tokens: int) -> None:
        with log.captured() as lines:
            self._context = loading.new_context(
                self._model, self._plan, num_tokens, self._abort_flag
            )
        self._footprint = log.footprint_from(self._model_lines + lines)
        self._num_cells = num_tokens
        self._num_batch_rows = lib.llama_n_batch(self._context)
        self._pool = KvPool(self._context, lib.llama_model_n_swa(self._model))

    def _free_context(self) -> None:
        if self._context is not None:
            lib.llama_free(self._context)
            self._context = None

    def _check_length(self, seq_id: int, num_tokens: int) -> None:
        found = self._pool.end(seq_id)
        if found != num_tokens:
            self._pool.drop(seq_id)
            raise EngineError(
                f"llama.cpp: a copy of {num_tokens} tokens holds {found}; "
                f"{self._plan.model.architecture} cannot be forked there"
            )

    def _checked_capabilities(self) -> Capabilities:
        plan, footprint = self._plan, self.footprint()
        found = self_check.check(self._model, self._context, self._pool, self._batch, plan)
        self._abilities = found
        return Capabilities(
            can_truncate=found.can_truncate,
            can_fork_prefix=found.can_fork_prefix,
            forks_share_kv=True,
            tile_rows=FLASH_TILE_ROWS if self._attends_in_tiles() else SMALL_TILE_ROWS,
            foreign_cell_s=self._foreign_cell_s(),
            can_export_range=found.can_export_range,
            can_shift=found.can_shift,
            batches_sequences=True,
            can_resize_kv=True,
            maps_weights=footprint.mapped_weights_bytes == footprint.weights_bytes,
            kv_types=frozenset(binding.GGML_TYPES),
            samplers=SAMPLERS,
            exact_profile=loading.is_exact_profile(plan),
        )

    def _attends_in_tiles(self) -> bool:
        return self._plan.flash_attention and not lib.llama_supports_gpu_offload()

    def _foreign_cell_s(self) -> float:
        """What the pool that all sequences share costs each of them; on GPUs it is not measured."""
        if lib.llama_supports_gpu_offload():
            return 0.0
        model = self._plan.model
        num_heads = model.num_heads * sum(map(bool, model.num_kv_heads))
        cell_s = CELL_CHECK_S if self._plan.flash_attention else CELL_READ_S
        return cell_s * num_heads / self._plan.num_threads

    def _spare(self) -> int:
        """An id that is not open; see `KvPool`.

        Raises:
            Busy: As many sequences are open as llama.cpp has ids.
        """
        return guards.free_slot(self._sequences, binding.MAX_SEQUENCES)

    def _num_shared(self, seq_id: int) -> int:
        """Tokens at its beginning whose cells others may hold too, of those that are open now.

        Whoever it once shared with may be gone or cut; and where two sequences hold a cell, they
        agree in all tokens up to it.
        """
        sequence = self._sequences[seq_id]
        others = (other for other in self._sequences.values() if other is not sequence)
        num_common = max((_num_common(sequence.tokens, each.tokens) for each in others), default=0)
        return min(sequence.num_shared, num_common)

    def _detach(self, seq_id: int, start: int) -> None:
        """Give a sequence cells of its own from token `start` on.

        Raises:
            Busy: Too few are free.
            EngineError: There is no room for the copy on its way.
        """
        try:
            self._pool.detach(seq_id, start, self._spare(), kv_block.temporary)
        except DoesNotFit as exc:
            raise Busy(f"{exc.message}, which a shift copies", retry_after_s=1.0) from exc
        except StoreError as exc:
            raise EngineError(f"llama.cpp: no copy to shift: {exc.message}") from exc

    def _turn_keys(self, seq_id: int) -> None:
        """Have llama.cpp turn the keys of moved cells now, which it does before it decodes.

        Not with the next step: until then an export would pair new positions with old keys, and
        an abort of that step would leave some layers turned.

        Raises:
            EngineError: They could not be turned.
        """
        length = self._pool.end(seq_id)
        self._batch.clear()
        self._batch.add(seq_id, [0], length, sample=False)
        set_callback = lib.llama_set_abort_callback
        set_callback(self._context, lib.ggml_abort_callback(0), None)
        try:
            with log.captured() as lines:
                # No matter whether the token found a cell.
                lib.llama_decode(self._context, self._batch.native)
        finally:
            set_callback(
                self._context, binding.abort_callback(), ctypes.addressof(self._abort_flag)
            )
        self._pool.cut(seq_id, length)
        for sequence in self._sequences.values():
            sequence.row = None
        if any(_TURNING in line for line in lines):
            raise EngineError(f"llama.cpp: keys could not be moved: {log.last_error()}")

    def _move_to_pool(self, num_tokens: int, state: memoryview) -> None:
        """Free the context, and make another with that state in it.

        Raises:
            BrimError: It cannot be made, or the state is not there any more.
        """
        self._free_context()
        for sequence in self._sequences.values():
            sequence.row = None
        # Scratch memory comes and goes in pieces that the C library would keep.
        trim_heap()
        self._create_context(num_tokens)
        self._restore_all(state)

    def _save_all(self) -> memoryview:
        """Every sequence at once, so that cells shared by forks stay shared."""
        return kv_block.write(self._kv_identity, [], *self._pool.state_of_all())

    def _restore_all(self, block: memoryview) -> None:
        self._pool.restore_all(kv_block.read(self._kv_identity, block).state)
        for seq_id, sequence in self._sequences.items():
            found = self._pool.end(seq_id)
            if found != len(sequence.tokens):
                raise EngineError(f"llama.cpp: sequence {seq_id} came back with {found} tokens")


def _num_common(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that two sequences begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
