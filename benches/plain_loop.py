"""A plain llama.cpp loop: load, llama_decode, sample; nothing of brim's.

The reference for equality (benches/equality.py) and for overhead (benches/overhead.py).  It uses
llama_cpp's low-level functions as llama.cpp's own examples use llama.h.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as llama
import numpy as np
from numpy.typing import NDArray

GGML_TYPES = {"f16": 1, "q8_0": 8, "bf16": 30, "f32": 0}


@llama.llama_log_callback  # type: ignore[untyped-decorator]
def _quiet(_level: int, _text: bytes, _user_data: Any) -> None:
    """Keep llama.cpp's log out of the bench's output."""


class PlainLoop:
    """One model, one sequence."""

    def __init__(
        self,
        path: Path,
        *,
        num_cells: int,
        kv_type: str = "f16",
        flash_attention: bool = False,
        repack_weights: bool = False,
        num_threads: int = 2,
        num_batch_threads: int | None = None,
        max_sequences: int = 1,
    ) -> None:
        llama.llama_log_set(_quiet, None)
        llama.llama_backend_init()
        model_params = llama.llama_model_default_params()
        model_params.use_extra_bufts = repack_weights
        self.model = llama.llama_model_load_from_file(str(path).encode(), model_params)
        params = llama.llama_context_default_params()
        params.n_ctx = num_cells
        params.n_batch = params.n_ubatch = 512
        params.n_seq_max = params.n_outputs_max = max_sequences
        params.kv_unified = True
        params.n_threads = num_threads
        params.n_threads_batch = num_batch_threads or num_threads
        params.type_k = params.type_v = GGML_TYPES[kv_type]
        params.flash_attn_type = int(flash_attention)
        self.context = llama.llama_init_from_model(self.model, params)
        if not self.context:
            raise SystemExit(f"llama.cpp cannot load {path} with these options")
        self.vocab = llama.llama_model_get_vocab(self.model)
        self.vocab_size: int = llama.llama_vocab_n_tokens(self.vocab)

    def close(self) -> None:
        """Free context and model."""
        llama.llama_free(self.context)
        llama.llama_model_free(self.model)

    def decode(self, tokens: Sequence[int]) -> None:
        """Feed tokens at the end of the sequence; the last one gives logits."""
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        status = llama.llama_decode(self.context, llama.llama_batch_get_one(array, len(tokens)))
        if status != 0:
            raise SystemExit(f"llama_decode failed with {status}")

    def logits(self) -> NDArray[np.float32]:
        """A copy of the last logits, shape (vocab_size,)."""
        pointer = llama.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(pointer, (self.vocab_size,)).copy()

    def greedy(
        self, prompt: Sequence[int], num_tokens: int
    ) -> tuple[list[int], list[NDArray[np.float32]]]:
        """Tokens drawn greedily after the prompt, and the logits behind each."""
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)
        self.decode(prompt)
        tokens: list[int] = []
        all_logits: list[NDArray[np.float32]] = []
        while True:
            all_logits.append(self.logits())
            tokens.append(int(all_logits[-1].argmax()))
            if len(tokens) == num_tokens:
                return tokens, all_logits
            self.decode(tokens[-1:])
