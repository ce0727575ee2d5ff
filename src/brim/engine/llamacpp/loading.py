"""A model and its context as a plan asks, and what llama.cpp would abort on refused before."""

import contextlib
import ctypes
from typing import Any

from brim.core.plan import Plan
from brim.engine.base import OnProgress
from brim.engine.llamacpp import binding, log, page_in
from brim.engine.llamacpp.binding import lib
from brim.engine.llamacpp.self_check import metadata
from brim.errors import EngineError, ModelFileError

READING_SHARE = 0.8
"""Of the time of a load from a disk; llama.cpp's own part is long only where it repacks."""

LOADED_SHARE = 0.95
"""Behind it come the context and a first step."""


def check_plan(plan: Plan) -> None:
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


def load_model(plan: Plan, on_progress: OnProgress | None = None) -> Any:
    """The mapped model.

    Args:
        plan: How.
        on_progress: Told the share that is done: of the reading first, then of what llama.cpp does
            with it.

    Raises:
        ModelFileError: llama.cpp cannot load it; its reason is quoted.
    """
    params = lib.llama_model_default_params()
    params.load_mode = binding.LOAD_MODE_MMAP
    params.use_extra_bufts = plan.repack_weights
    if on_progress is not None:
        told = on_progress
        page_in.read_in(plan.model.paths, lambda done: told(READING_SHARE * done))
        # Kept in a name: ctypes frees a callback that nobody holds.
        callback = _progress_callback(told)
        params.progress_callback = callback
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


def _progress_callback(on_progress: OnProgress) -> Any:
    """llama.cpp's callback; called once a tensor, so a Python function there costs nothing."""

    def callback(fraction: float, _user_data: Any) -> bool:
        # No exception may cross llama.cpp; a report that fails must not end the loading either.
        with contextlib.suppress(Exception):
            on_progress(READING_SHARE + (LOADED_SHARE - READING_SHARE) * fraction)
        return True

    return lib.llama_progress_callback(callback)


def new_context(model: Any, plan: Plan, num_tokens: int, abort_flag: Any) -> Any:
    """A context with a pool of `num_tokens` cells.

    Args:
        model: From `load_model`.
        plan: Everything else.
        num_tokens: Cells of the pool.
        abort_flag: A ctypes buffer of two bytes that outlives the context: a step gives up once the
            first is not 0.

    Raises:
        EngineError: llama.cpp made none; its reason is quoted.
    """
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
    params.abort_callback = binding.abort_callback()
    params.abort_callback_data = ctypes.addressof(abort_flag)
    context = lib.llama_init_from_model(model, params)
    if not context:
        raise EngineError(
            f"llama.cpp: no context of {num_tokens} tokens "
            f"(KV {plan.kv_type_k}/{plan.kv_type_v}): {log.last_error()}"
        )
    return context


def check_generates(model: Any, context: Any, plan: Plan) -> None:
    """Refuse models that load but have no next token: decoding them aborts the process.

    Raises:
        ModelFileError: It is one.
    """
    architecture = plan.model.architecture
    if (
        lib.llama_model_has_encoder(model)
        or not lib.llama_model_has_decoder(model)
        or lib.llama_model_is_diffusion(model)
        or lib.llama_vocab_type(lib.llama_model_get_vocab(model)) == binding.VOCAB_TYPE_NONE
        or metadata(model, f"{architecture}.attention.causal") == "false"
        or not lib.llama_get_memory(context)
    ):
        raise ModelFileError(
            f"{plan.model.paths[0]}: {architecture} is not a model that "
            "continues text (an encoder, an embedder or diffusion); choose a chat or base model"
        )


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
