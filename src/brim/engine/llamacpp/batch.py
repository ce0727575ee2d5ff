"""The rows of one llama_decode call, in arrays that are allocated once."""

import ctypes
from typing import Any

import numpy as np

from brim.engine.llamacpp.binding import lib


class Batch:
    """A llama_batch of at most `capacity` rows, each of one sequence."""

    def __init__(self, capacity: int) -> None:
        self.num_rows = 0
        self.tokens = np.zeros(capacity, np.int32)
        self.positions = np.zeros(capacity, np.int32)
        self.outputs = np.zeros(capacity, np.int8)
        self._seq_ids = np.zeros(capacity, np.int32)
        self._num_seq_ids = np.ones(capacity, np.int32)
        # llama_batch wants a pointer to each row's list of sequences; every list has one entry.
        self._seq_id_pointers = self._seq_ids.ctypes.data + 4 * np.arange(capacity, dtype=np.uint64)
        self.native: Any = lib.llama_batch(
            n_tokens=0,
            token=_pointer(self.tokens, ctypes.c_int32),
            embd=None,
            pos=_pointer(self.positions, ctypes.c_int32),
            n_seq_id=_pointer(self._num_seq_ids, ctypes.c_int32),
            seq_id=_pointer(self._seq_id_pointers, ctypes.POINTER(ctypes.c_int32)),
            logits=_pointer(self.outputs, ctypes.c_int8),
        )

    def clear(self) -> None:
        """Start a new step."""
        self.num_rows = 0

    def add(self, seq_id: int, tokens: Any, position: int, *, sample: bool) -> int:
        """Append one sequence's rows; returns the last row's index, where its logits will be."""
        start, num_fed = self.num_rows, len(tokens)
        if num_fed == 1:
            # The hot path: one decoding sequence, without array temporaries.
            self.tokens[start] = tokens[0]
            self.positions[start] = position
            self._seq_ids[start] = seq_id
            self.outputs[start] = sample
        else:
            end = start + num_fed
            self.tokens[start:end] = tokens
            self.positions[start:end] = np.arange(position, position + num_fed)
            self._seq_ids[start:end] = seq_id
            self.outputs[start:end] = 0
            self.outputs[end - 1] = sample
        self.num_rows = start + num_fed
        self.native.n_tokens = self.num_rows
        return self.num_rows - 1


def _pointer(array: np.ndarray[Any, Any], target: Any) -> Any:
    return ctypes.cast(ctypes.c_void_p(array.ctypes.data), ctypes.POINTER(target))
