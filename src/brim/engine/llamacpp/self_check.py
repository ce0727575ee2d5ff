"""What llama.cpp can do with a model's cache: its word, where it aborts otherwise, and then a try.

A few tokens are fed, shared, cut and exported when the model is loaded, and what is seen is
believed.  Nothing is tried that would abort the process where it fails.
"""

import ctypes
from typing import Any

import msgspec

from brim.core.plan import Plan
from brim.engine import kv_block
from brim.engine.llamacpp import binding, log
from brim.engine.llamacpp.batch import Batch
from brim.engine.llamacpp.binding import lib
from brim.engine.llamacpp.kv import KvPool
from brim.errors import EngineError, StoreError

_NUM_TOKENS = 4
"""Enough to cut, fork and export in the middle."""

_WHOLE_ONLY = frozenset({"deepseek4"})
"""Architectures whose cache llama.cpp aborts on copying a part of, and does not call hybrid.

Source: llama_kv_cache_dsv4::seq_cp of src/llama-kv-cache-dsv4.cpp.
"""

_TURNABLE_KEYS = frozenset({"f16", "f32"})
"""KV types of K that are turned in place, and unchanged where they are turned by nothing.

llama.cpp turns the keys of the whole pool.  Quantised ones come back rounded once more, those of
other sequences included, and bf16 aborts.

Source: build_rope_shift of src/llama-kv-cache.cpp, ggml_compute_forward_rope of ggml-cpu's ops.cpp.
"""

_ROPE_TYPES = frozenset({0, 2})
"""LLAMA_ROPE_TYPE_NORM and _NEOX: one position a token, and keys that hold it."""

_SCALES_KEYS = ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor")


class Abilities(msgspec.Struct, frozen=True, kw_only=True):
    """What can be done with sequences' states."""

    can_part: bool
    """Part of a state may be looked at; whether that part is there is another matter."""
    can_truncate: bool
    can_fork_prefix: bool
    can_export_range: bool
    can_shift: bool


def metadata(model: Any, key: str) -> str:
    """One value of the file's header as text; empty where it is absent."""
    buffer = ctypes.create_string_buffer(64)
    count = lib.llama_model_meta_val_str(model, key.encode(), buffer, len(buffer))
    return buffer.value.decode("utf-8", "replace") if count >= 0 else ""


def check(model: Any, context: Any, pool: KvPool, batch: Batch, plan: Plan) -> Abilities:
    """Find out; the pool is empty before and after.

    Raises:
        EngineError: The model does not decode.
    """
    num_tokens = min(_NUM_TOKENS, plan.max_batch_tokens)
    batch.clear()
    batch.add(0, [0] * num_tokens, 0, sample=True)
    # The first step is the one that reads weights into memory: of a mixture, of all experts.
    lib.llama_set_warmup(context, True)
    status = lib.llama_decode(context, batch.native)
    lib.llama_set_warmup(context, False)
    if status != 0:
        raise EngineError(f"llama.cpp: the model does not decode: {log.last_error()}")
    # A window's cells are given to others once nobody sees them, so not *any* prefix is there.
    is_kept = lib.llama_model_n_swa(model) == 0
    can_part = num_tokens == _NUM_TOKENS and _can_part(model, plan)
    spare = plan.max_sequences if plan.max_sequences < binding.MAX_SEQUENCES else 1
    can_fork = can_part and _forks(pool, spare)
    can_export = can_fork and is_kept and _exports_range(pool, spare)
    can_cut = can_part and pool.cut(0, 2) and pool.end(0) == 2
    pool.clear()
    return Abilities(
        can_part=can_cut and can_fork,
        can_truncate=can_cut and is_kept,
        can_fork_prefix=can_fork and is_kept,
        can_export_range=can_export and can_cut,
        can_shift=can_export and can_cut and _can_shift(model, context, plan),
    )


def _can_part(model: Any, plan: Plan) -> bool:
    return not (
        lib.llama_model_is_recurrent(model)
        or lib.llama_model_is_hybrid(model)
        or plan.model.architecture in _WHOLE_ONLY
    )


def _forks(pool: KvPool, spare: int) -> bool:
    pool.share(0, spare, 2)
    is_shared = pool.start(spare) == 0 and pool.end(spare) == 2
    pool.drop(spare)
    return is_shared and pool.end(0) == _NUM_TOKENS


def _exports_range(pool: KvPool, spare: int) -> bool:
    """Take the last tokens out but for one, and put them back."""
    start, end = 1, _NUM_TOKENS - 1
    with pool.narrowed(0, start, end, spare):
        size, fill = pool.state_of(0)
        state = memoryview(bytearray(size))
        is_written = fill(kv_block.address_of(state), size) == size
    pool.cut(0, start)
    try:
        pool.append(0, state, start, end, spare)
    except StoreError:
        return False
    finally:
        # As long as it was, for whoever tries something else.
        is_back = pool.start(0) == 0 and pool.end(0) == end
    return is_written and is_back


def _can_shift(model: Any, context: Any, plan: Plan) -> bool:
    """Whether keys can be turned to other positions without changing anything else.

    A scaled key (YaRN, LongRoPE) would be scaled again whenever any key is turned.
    """
    architecture = plan.model.architecture
    values = [metadata(model, f"{architecture}.{key}") for key in _SCALES_KEYS]
    return (
        plan.kv_type_k in _TURNABLE_KEYS
        and lib.llama_model_rope_type(model) in _ROPE_TYPES
        and bool(lib.llama_memory_can_shift(lib.llama_get_memory(context)))
        and metadata(model, f"{architecture}.rope.scaling.type") != "yarn"
        and all(value == "" or float(value) == 1.0 for value in values)
    )
