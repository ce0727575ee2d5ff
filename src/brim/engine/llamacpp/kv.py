"""One context's KV pool: which cells a sequence holds, and their way out of memory and back.

llama.cpp keeps with every cell a position and the set of sequences that hold it.  Sharing, cutting
and dropping change these sets alone; only exports and imports move bytes.  All sequences are of one
pool (`kv_unified`), and the caches can be cut, where a method does not say otherwise.
"""

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from typing import Any

from brim.engine import kv_block
from brim.engine.base import Allocate
from brim.engine.llamacpp import log
from brim.engine.llamacpp.binding import lib
from brim.errors import DoesNotFit, EngineError, StoreError

Fill = Callable[[int, int], int]
"""Writes a state to (address, size); the bytes written."""

_NO_ROOM = "available cells in kv cache"
"""How llama.cpp says that an import found the pool full; every other refusal is a bad block."""


class KvPool:
    """The pool of one context.

    Sequence ids are llama.cpp's.  A *spare* is the id of no open sequence; it may lie beyond the
    context's `n_seq_max`: a unified pool has bookkeeping for 256 ids whatever that is, and a larger
    `n_seq_max` would take memory for the outputs of a sequence that never decodes.  Such an id must
    not be exported, because cells are written out with ids below `n_seq_max` only, nor decoded.

    Source: `seq_to_stream` and `state_write_meta` of llama.cpp's src/llama-kv-cache.cpp.

    Args:
        context: A llama_context; the pool ends with it.
        window_tokens: Tokens that the shortest-sighted layers look back, itself included; 0 where
            all see everything.
    """

    def __init__(self, context: Any, window_tokens: int) -> None:
        self._context = context
        self._memory = lib.llama_get_memory(context)
        self._window_tokens = window_tokens

    # --- who holds which cells -----------------------------------------------------------------

    def end(self, seq_id: int) -> int:
        """Position behind the last token that a sequence holds; 0 where it holds none."""
        return int(lib.llama_memory_seq_pos_max(self._memory, seq_id)) + 1

    def start(self, seq_id: int) -> int:
        """Position of the first token of which all layers hold something; -1 where there is none.

        Layers with a window let go of what nobody can see any more, and of what an import lacked.
        """
        return int(lib.llama_memory_seq_pos_min(self._memory, seq_id))

    def can_keep(self, seq_id: int, num_tokens: int) -> bool:
        """Whether every layer still has what the token behind the first `num_tokens` sees."""
        first_seen = num_tokens - self._window_tokens + 1 if self._window_tokens else 0
        return self.start(seq_id) <= max(0, first_seen)

    def share(self, source: int, target: int, num_tokens: int | None = None) -> None:
        """Have `target` hold the first `num_tokens` of `source` as well.

        All of them where None, as it must be where the state cannot be cut.
        """
        end = -1 if num_tokens is None else num_tokens
        lib.llama_memory_seq_cp(self._memory, source, target, 0, end)

    def cut(self, seq_id: int, num_tokens: int) -> bool:
        """Keep the first `num_tokens`; False where the state cannot be cut."""
        return bool(lib.llama_memory_seq_rm(self._memory, seq_id, num_tokens, -1))

    def drop(self, seq_id: int) -> None:
        """Hold nothing any more, which never fails, whatever the architecture."""
        lib.llama_memory_seq_rm(self._memory, seq_id, -1, -1)

    def clear(self) -> None:
        """Drop everything, data included."""
        lib.llama_memory_clear(self._memory, True)

    # --- out of memory and back ----------------------------------------------------------------

    @contextlib.contextmanager
    def narrowed(self, seq_id: int, start: int, end: int, spare: int) -> Iterator[None]:
        """A sequence that holds tokens [start, end) alone, as long as they are being exported.

        The spare holds all of it meanwhile: the other way round needs an id below `n_seq_max`,
        and with all sequences open there is none.
        """
        copy, remove = lib.llama_memory_seq_cp, lib.llama_memory_seq_rm
        copy(self._memory, seq_id, spare, -1, -1)
        try:
            remove(self._memory, seq_id, 0, start)
            remove(self._memory, seq_id, end, -1)
            yield
        finally:
            remove(self._memory, seq_id, -1, -1)
            copy(self._memory, spare, seq_id, -1, -1)
            remove(self._memory, spare, -1, -1)

    def state_of(self, seq_id: int) -> tuple[int, Fill]:
        """Bytes of all that a sequence holds, and what writes them."""

        def fill(address: int, size: int) -> int:
            target = ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8))
            return int(lib.llama_state_seq_get_data(self._context, target, size, seq_id))

        return int(lib.llama_state_seq_get_size(self._context, seq_id)), fill

    def restore(self, seq_id: int, state: memoryview, start: int, end: int) -> None:
        """Fill an empty sequence, or a spare, from an exported state of tokens [start, end).

        Raises:
            DoesNotFit: Too few cells are free.
            StoreError: The state is of another place or another cache.  The sequence is empty.
        """
        with log.captured() as lines:
            if not lib.llama_state_seq_set_data(self._context, *_source(state), seq_id):
                self.drop(seq_id)
                if any(_NO_ROOM in line for line in lines):
                    raise DoesNotFit(f"the KV pool has no room for {end - start} stored tokens")
                raise StoreError(f"llama.cpp refused a stored KV block: {log.last_error()}")
        # Whole states of recurrent layers, and of windows, say another first token.
        is_in_place = start == 0 or self.start(seq_id) == start
        if self.end(seq_id) != end or not is_in_place:
            self.drop(seq_id)
            raise StoreError("a stored KV block has other positions than it says")

    def append(self, seq_id: int, state: memoryview, start: int, end: int, spare: int) -> None:
        """Add an exported state of tokens [start, end) to a sequence that ends at `start`.

        llama.cpp empties the sequence that it fills, so the state goes by way of the spare.

        Raises:
            DoesNotFit: Too few cells are free.
            StoreError: As in `restore`.  The sequence is as it was.
        """
        self.restore(spare, state, start, end)
        self.share(spare, seq_id)
        self.drop(spare)

    def state_of_all(self) -> tuple[int, Fill]:
        """Bytes of everything at once, so that cells shared by forks stay shared; and the writer.

        Any architecture.
        """

        def fill(address: int, size: int) -> int:
            target = ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8))
            return int(lib.llama_state_get_data(self._context, target, size))

        return int(lib.llama_state_get_size(self._context)), fill

    def restore_all(self, state: memoryview) -> None:
        """Fill an empty pool of any architecture from what `state_of_all` wrote.

        Raises:
            EngineError: They do not fit, or llama.cpp refuses them for another reason.
        """
        if not lib.llama_state_set_data(self._context, *_source(state)):
            raise EngineError(f"llama.cpp: sequences could not be moved: {log.last_error()}")

    # --- moving up -----------------------------------------------------------------------------

    def detach(self, seq_id: int, start: int, spare: int, allocate: Allocate) -> None:
        """Give a sequence cells of its own from token `start` on, which it must hold.

        Raises:
            DoesNotFit: Too few cells are free; the sequence is as it was.
            StoreError: There is no room for the copy, which `allocate` makes; likewise.
        """
        end = self.end(seq_id)
        with self.narrowed(seq_id, start, end, spare):
            size, fill = self.state_of(seq_id)
            state = allocate(size)
            fill(kv_block.address_of(state), size)
        self.restore(spare, state, start, end)
        self.cut(seq_id, start)
        self.share(spare, seq_id)
        self.drop(spare)

    def close_gap(self, seq_id: int, num_kept: int, num_dropped: int) -> None:
        """Drop tokens and move those behind them up; the next decode turns their keys.

        The cells behind the gap must be the sequence's own: a position is the cell's, and changes
        for everybody who holds it.
        """
        behind = num_kept + num_dropped
        lib.llama_memory_seq_rm(self._memory, seq_id, num_kept, behind)
        lib.llama_memory_seq_add(self._memory, seq_id, behind, -1, -num_dropped)


def _source(state: memoryview) -> tuple[Any, int]:
    """Pointer and length of a readable buffer, without a copy."""
    return ctypes.cast(kv_block.address_of(state), ctypes.POINTER(ctypes.c_uint8)), len(state)
