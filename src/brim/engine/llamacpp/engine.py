"""The llama.cpp engine: llama.h's functions behind the engine contract.

Always mapped, never locked into memory; one unified KV pool that all sequences share; prefill
chunks and decode tokens mixed in one llama_decode; sampling in C.  Everything on which llama.cpp
would abort the process is refused before the call (engine.guards).
"""

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
from brim.engine.base import Allocate, Capabilities, Engine
from brim.engine.llamacpp import binding, log
from brim.engine.llamacpp.batch import Batch
from brim.engine.llamacpp.binding import lib
from brim.engine.llamacpp.sampler_chain import SAMPLERS, ChainBuilder
from brim.engine.llamacpp.tokenizer import LlamaTokenizer
from brim.errors import Busy, DoesNotFit, EngineError, ModelFileError, StoreError

_SELF_CHECK_TOKENS = 4
"""Enough to cut and fork in the middle."""

_NO_ROOM = "available cells in kv cache"
"""How llama.cpp says that an import found the pool full; every other refusal is a bad block."""


class LlamaSequence:
    """One open sequence: what was fed, and the C sampler chain that draws for it."""

    __slots__ = ("chain", "drawn", "row", "sampling", "tokens")

    def __init__(self, sampling: SamplingParams, chain: Any) -> None:
        self.sampling = sampling
        self.chain = chain
        self.tokens: list[int] = []
        self.row: int | None = None
        """Row of the last step that holds this sequence's logits."""
        self.drawn: int | None = None
        """Token drawn last and not fed yet; the chain's penalties have seen it already."""


class LlamaCppEngine(Engine):
    """See the module's docstring and base.py."""

    _model: Any = None
    _context: Any = None
    _chains: ChainBuilder

    def load(self, plan: Plan) -> None:
        binding.check_layout()
        _check_plan(plan)
        log.install()
        lib.llama_backend_init()
        self._plan = plan
        self._sequences: dict[int, LlamaSequence] = {}
        self._submitted: StepPlan | None = None
        self._abort_flag = ctypes.create_string_buffer(2)
        self._batch = Batch(plan.max_batch_tokens)
        with log.captured() as lines:
            self._model = self._load_model(plan)
        self._model_lines = lines
        self._vocab = lib.llama_model_get_vocab(self._model)
        self._create_context(plan.kv_tokens)
        self._check_generates()
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
        return log.footprint_from(self._model_lines + self._context_lines)

    # --- sequences -----------------------------------------------------------------------------

    def open(self, sampling: SamplingParams, max_tokens: int | None = None) -> int:
        guards.check_sampling(sampling, SAMPLERS, self._tokenizer.vocab_size)
        seq_id = guards.free_slot(self._sequences, self._plan.max_sequences)
        self._sequences[seq_id] = LlamaSequence(sampling, self._chains.build(sampling))
        return seq_id

    def close(self, seq_id: int) -> None:
        sequence = guards.known(self._sequences, seq_id)
        # Removing a whole sequence never fails, whatever the architecture.
        lib.llama_memory_seq_rm(self._memory, seq_id, -1, -1)
        lib.llama_sampler_free(sequence.chain)
        del self._sequences[seq_id]

    def num_tokens(self, seq_id: int) -> int:
        return len(guards.known(self._sequences, seq_id).tokens)

    def fork(self, source: int, target: int, num_tokens: int) -> None:
        src, dst = (guards.known(self._sequences, seq_id) for seq_id in (source, target))
        guards.check_fork(len(src.tokens), len(dst.tokens), num_tokens)
        if num_tokens == 0:
            return
        if not self._capabilities.can_fork_prefix:
            owner = f"llama.cpp: the state of {self._plan.model.architecture}"
            guards.check_whole(len(src.tokens), num_tokens, owner)
        lib.llama_memory_seq_cp(self._memory, source, target, 0, num_tokens)
        self._check_length(target, num_tokens)
        dst.tokens = src.tokens[:num_tokens]
        self._accept(dst, dst.tokens)

    def truncate(self, seq_id: int, num_tokens: int) -> None:
        sequence = guards.known(self._sequences, seq_id)
        guards.check_truncate(len(sequence.tokens), num_tokens)
        if num_tokens < len(sequence.tokens):
            if num_tokens > 0 and not self._capabilities.can_truncate:
                raise EngineError(
                    f"llama.cpp: the state of {self._plan.model.architecture} cannot be cut"
                )
            if not lib.llama_memory_seq_rm(self._memory, seq_id, num_tokens, -1):
                raise EngineError(f"llama.cpp: cannot cut sequence {seq_id} to {num_tokens} tokens")
            del sequence.tokens[num_tokens:]
        self._restart_chain(sequence)

    def shift(self, seq_id: int, num_kept: int, num_dropped: int) -> None:
        sequence = guards.known(self._sequences, seq_id)
        guards.check_shift(len(sequence.tokens), num_kept, num_dropped)
        raise EngineError(f"llama.cpp: {self._plan.model.architecture} cannot be shifted")

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
        end = guards.check_range(len(sequence.tokens), start, end)
        guards.check_whole_range(len(sequence.tokens), start, end, "llama.cpp: KV")

        def fill(address: int, size: int) -> int:
            target = ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8))
            return int(lib.llama_state_seq_get_data(self._context, target, size, seq_id))

        size = lib.llama_state_seq_get_size(self._context, seq_id)
        return kv_block.write(
            self._kv_identity, sequence.tokens, size, fill, start=start, allocate=allocate
        )

    def import_kv(self, seq_id: int, blob: bytes | memoryview) -> None:
        sequence = guards.known(self._sequences, seq_id)
        block = kv_block.read(self._kv_identity, blob)
        kv_block.check_place(block, len(sequence.tokens), self._plan.context_tokens)
        tokens, state = block.tokens, block.state
        address = np.frombuffer(state, np.uint8).ctypes.data
        source = ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8))
        with log.captured() as lines:
            if not lib.llama_state_seq_set_data(self._context, source, len(state), seq_id):
                lib.llama_memory_seq_rm(self._memory, seq_id, -1, -1)
                if any(_NO_ROOM in line for line in lines):
                    raise DoesNotFit(f"the KV pool has no room for {len(tokens)} stored tokens")
                raise StoreError(f"llama.cpp refused a stored KV block: {log.last_error()}")
        if lib.llama_memory_seq_pos_max(self._memory, seq_id) != len(tokens) - 1:
            lib.llama_memory_seq_rm(self._memory, seq_id, -1, -1)
            raise StoreError("a stored KV block has other positions than it says")
        sequence.tokens = tokens
        self._accept(sequence, tokens)

    def resize_kv(self, num_tokens: int) -> None:
        """Move all sequences through a mapped file into a new context.

        The old context is freed before the new one is made: a resize is asked for when memory is
        short, and both at once would be the peak that it is meant to prevent.
        """
        guards.check_resize(0, num_tokens)
        before = self._num_cells
        state = self._save_all()
        self._free_context()
        try:
            self._create_context(num_tokens)
            self._restore_all(state)
        except EngineError as exc:
            self._free_context()
            try:
                self._create_context(before)
                self._restore_all(state)
            except EngineError as fatal:
                # Nothing can be stepped any more; a context that is not there must not be touched.
                self.shutdown()
                raise EngineError(f"{fatal.message}; the model must be loaded again") from exc
            raise DoesNotFit(
                f"a KV pool of {num_tokens} tokens is too small for the open sequences"
            ) from exc
        for sequence in self._sequences.values():
            sequence.row = None

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
        status = lib.llama_decode(self._context, batch.native)
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
        token = lib.llama_sampler_sample(sequence.chain, self._context, sequence.row)
        sequence.drawn = token
        if params.num_logprobs is None:
            return Sampled(feed.seq_id, token)
        biased = host.apply_bias(self.logits(feed.seq_id), params, self._tokenizer.eog_tokens)
        logprob, top = host.top_logprobs(host.logprobs_of(biased), token, params.num_logprobs)
        return Sampled(feed.seq_id, token, logprob, top)

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
            lib.llama_memory_seq_rm(self._memory, feed.seq_id, held, -1)

    def _decode_error(self, status: int, plan: StepPlan) -> EngineError | Busy:
        rows = plan.num_scheduled_tokens
        if status == 1:
            return Busy(f"the KV pool has no room for {rows} more tokens", retry_after_s=1.0)
        if status == 2:
            return EngineError("llama.cpp: the step was aborted")
        reason = log.last_error()
        return EngineError(f"llama.cpp: decode failed with {status}" + (reason and f": {reason}"))

    def _load_model(self, plan: Plan) -> Any:
        params = lib.llama_model_default_params()
        params.load_mode = binding.LOAD_MODE_MMAP
        params.use_extra_bufts = plan.repack_weights
        paths = [path.encode() for path in plan.model.paths]
        if len(paths) == 1:
            model = lib.llama_model_load_from_file(paths[0], params)
        else:
            array = (ctypes.c_char_p * len(paths))(*paths)
            model = lib.llama_model_load_from_splits(array, len(paths), params)
        if not model:
            raise ModelFileError(
                f"{plan.model.paths[0]}: llama.cpp {binding.VERSION} cannot load it "
                f"({log.last_error()}); try another file or another quant of the model"
            )
        return model

    def _metadata(self, key: str) -> str:
        """One value of the file's header as text; empty where it is absent."""
        buffer = ctypes.create_string_buffer(64)
        count = lib.llama_model_meta_val_str(self._model, key.encode(), buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace") if count >= 0 else ""

    def _check_generates(self) -> None:
        """Refuse models that load but have no next token: decoding them aborts the process."""
        if (
            lib.llama_model_has_encoder(self._model)
            or not lib.llama_model_has_decoder(self._model)
            or lib.llama_model_is_diffusion(self._model)
            or lib.llama_vocab_type(self._vocab) == binding.VOCAB_TYPE_NONE
            or self._metadata(f"{self._plan.model.architecture}.attention.causal") == "false"
            or not self._memory
        ):
            raise ModelFileError(
                f"{self._plan.model.paths[0]}: {self._plan.model.architecture} is not a model that "
                "continues text (an encoder, an embedder or diffusion); choose a chat or base model"
            )

    def _create_context(self, num_tokens: int) -> None:
        plan = self._plan
        params = lib.llama_context_default_params()
        params.n_ctx = num_tokens
        params.n_batch = plan.max_batch_tokens
        params.n_ubatch = plan.micro_batch_tokens
        params.n_seq_max = plan.max_sequences
        # One output a sequence and step: the default reserves logits for every row of a batch.
        params.n_outputs_max = plan.max_sequences
        params.n_threads = plan.num_threads
        params.n_threads_batch = plan.num_batch_threads
        params.flash_attn_type = binding.FLASH_ATTENTION[plan.flash_attention]
        params.type_k = binding.GGML_TYPES[plan.kv_type_k]
        params.type_v = binding.GGML_TYPES[plan.kv_type_v]
        params.kv_unified = True
        params.no_perf = True
        params.abort_callback = ctypes.cast(
            binding.ABORT_CALLBACK_ADDRESS, type(params.abort_callback)
        )
        params.abort_callback_data = ctypes.addressof(self._abort_flag)
        with log.captured() as lines:
            self._context = lib.llama_init_from_model(self._model, params)
        if not self._context:
            self._context = None
            raise EngineError(
                f"llama.cpp: no context of {num_tokens} tokens "
                f"(KV {plan.kv_type_k}/{plan.kv_type_v}): {log.last_error()}"
            )
        self._context_lines = lines
        self._num_cells = num_tokens
        self._num_batch_rows = lib.llama_n_batch(self._context)
        self._memory = lib.llama_get_memory(self._context)

    def _free_context(self) -> None:
        if self._context is not None:
            lib.llama_free(self._context)
            self._context = None

    def _check_length(self, seq_id: int, num_tokens: int) -> None:
        found = lib.llama_memory_seq_pos_max(self._memory, seq_id) + 1
        if found != num_tokens:
            lib.llama_memory_seq_rm(self._memory, seq_id, -1, -1)
            raise EngineError(
                f"llama.cpp: a copy of {num_tokens} tokens holds {found}; "
                f"{self._plan.model.architecture} cannot be forked there"
            )

    def _checked_capabilities(self) -> Capabilities:
        """Cut and fork a few tokens, and believe what is seen rather than what is announced."""
        can_cut = can_fork = self._has_sliceable_state()
        lengths = min(_SELF_CHECK_TOKENS, self._num_cells)
        self._batch.clear()
        self._batch.add(0, [0] * lengths, 0, sample=True)
        if lib.llama_decode(self._context, self._batch.native) != 0:
            raise EngineError(f"llama.cpp: the model does not decode: {log.last_error()}")
        pos_max = lib.llama_memory_seq_pos_max
        if can_fork and self._plan.max_sequences > 1:
            lib.llama_memory_seq_cp(self._memory, 0, 1, 0, 2)
            can_fork = pos_max(self._memory, 1) == 1
        if can_cut:
            removed = lib.llama_memory_seq_rm(self._memory, 0, lengths - 1, -1)
            can_cut = removed and pos_max(self._memory, 0) == lengths - 2
        lib.llama_memory_clear(self._memory, True)
        plan, footprint = self._plan, self.footprint()
        return Capabilities(
            can_truncate=can_cut,
            can_fork_prefix=can_fork,
            forks_share_kv=True,
            can_export_range=False,
            can_shift=False,
            batches_sequences=True,
            can_resize_kv=True,
            maps_weights=footprint.mapped_weights_bytes == footprint.weights_bytes,
            kv_types=frozenset(binding.GGML_TYPES),
            samplers=SAMPLERS,
            exact_profile=is_exact_profile(plan),
        )

    def _has_sliceable_state(self) -> bool:
        return not (
            lib.llama_model_is_recurrent(self._model) or lib.llama_model_is_hybrid(self._model)
        )

    def _save_all(self) -> memoryview:
        """Every sequence at once, so that cells shared by forks stay shared."""
        size = lib.llama_state_get_size(self._context)

        def fill(address: int, size: int) -> int:
            target = ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8))
            return int(lib.llama_state_get_data(self._context, target, size))

        return kv_block.write(self._kv_identity, [], size, fill)

    def _restore_all(self, block: memoryview) -> None:
        state = kv_block.read(self._kv_identity, block).state
        address = np.frombuffer(state, np.uint8).ctypes.data
        source = ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8))
        if not lib.llama_state_set_data(self._context, source, len(state)):
            raise EngineError(f"llama.cpp: sequences could not be moved: {log.last_error()}")
        for seq_id, sequence in self._sequences.items():
            found = lib.llama_memory_seq_pos_max(self._memory, seq_id) + 1
            if found != len(sequence.tokens):
                raise EngineError(f"llama.cpp: sequence {seq_id} came back with {found} tokens")


def is_exact_profile(plan: Plan) -> bool:
    """Whether results are the same to the bit in any batch: what was measured to make them so.

    Float weights are not: one row and several take different matrix kernels.  Nor is a float KV
    cache: flash attention changes kernels at 64 query rows, and without it at 2.

    Source: measured on a 2-core x86-64 Linux machine, 2026-11, benches/equality.py.
    """
    return (
        plan.model.quant not in ("", "F32", "F16", "BF16")
        and plan.kv_type_k == plan.kv_type_v == "q8_0"
        and plan.flash_attention
        and not plan.repack_weights
        and plan.environment.get("GGML_CPU_TILED_MM") == "0"
    )


def _check_plan(plan: Plan) -> None:
    """Refuse plans on which llama.cpp would abort or silently do something else."""
    if not 1 <= plan.max_sequences <= binding.MAX_SEQUENCES:
        raise EngineError(
            f"llama.cpp: {plan.max_sequences} sequences; it takes 1 to {binding.MAX_SEQUENCES}"
        )
    for kv_type in (plan.kv_type_k, plan.kv_type_v):
        if kv_type not in binding.GGML_TYPES:
            raise EngineError(
                f"llama.cpp: no KV type '{kv_type}'; choose one of {', '.join(binding.GGML_TYPES)}"
            )
    if plan.kv_type_v not in ("f16", "f32", "bf16") and not plan.flash_attention:
        raise EngineError("llama.cpp: a quantised V cache needs flash attention")
    if plan.micro_batch_tokens > plan.max_batch_tokens:
        raise EngineError("llama.cpp: the micro-batch is larger than the batch")
