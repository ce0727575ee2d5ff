"""Bytes of a loaded model, term by term, for each engine."""

from typing import Any

import msgspec
import pytest

from brim.core.memory import MemoryTerms
from brim.core.model import KvLayer, ModelSpec
from brim.errors import ConfigError
from brim.planner.memory import memory_terms
from brim.planner.mlx_kv import mlx_kv_types
from brim.planner.overhead import WORKER_OVERHEAD_BYTES, repacked_bytes, work_bytes

MIB = 1024**2


def terms_of(spec: ModelSpec, **changes: Any) -> MemoryTerms:
    """The terms with usual options, but for what a test changes."""
    options: dict[str, Any] = {
        "engine": "llamacpp", "kv_tokens": 1024, "max_sequences": 1, "kv_type_k": "f16",
        "kv_type_v": "f16", "micro_batch_tokens": 512, "flash_attention": True,
        "repack_weights": False,
    }  # fmt: skip
    return memory_terms(spec, **(options | changes))


def test_terms_of_a_plan(llama_1b: ModelSpec) -> None:
    """Weights are mapped, KV is that of a padded pool, and the process itself is counted."""
    terms = terms_of(llama_1b, kv_tokens=1000)
    assert terms.weights_bytes == terms.mapped_bytes == llama_1b.weights_bytes
    assert terms.kv_bytes == 1024 * 32768
    assert terms.repacked_bytes == 0
    assert terms.overhead_bytes > WORKER_OVERHEAD_BYTES
    assert terms.total_bytes == terms.load_peak_bytes


def test_scratch_that_nobody_writes_to_is_not_resident(llama_1b: ModelSpec) -> None:
    """The input for embeddings from outside is reserved, and never touched."""
    terms = terms_of(llama_1b)
    assert terms.compute_bytes - terms.compute_touched_bytes == 512 * 2048 * 4
    assert terms.total_bytes - terms.resident_bytes == 512 * 2048 * 4


def test_repacking_copies_the_types_that_llamacpp_rearranges(llama_1b: ModelSpec) -> None:
    """Matrices in Q4_K are held twice, those in Q6_K and F32 once; a GPU rearranges nothing."""
    sizes = {"Q4_K": 466_616_320, "Q6_K": 117_669_888, "F32": 1000}
    spec = msgspec.structs.replace(llama_1b, matrix_bytes=sizes)
    assert repacked_bytes(spec) == 466_616_320
    assert terms_of(spec, repack_weights=True).repacked_bytes == 466_616_320
    assert terms_of(spec, repack_weights=True, on_gpu=True).repacked_bytes == 0


def test_scores_are_converted_where_attention_is_not_fused(llama_1b: ModelSpec) -> None:
    """Without flash attention the work buffer has every score once more, as f16; f32 needs none."""
    sizes = {
        kv_type: work_bytes(
            llama_1b, num_rows=512, kv_tokens=8192, kv_type_v=kv_type, flash_attention=False
        )
        for kv_type in ("f16", "f32")
    }
    assert sizes["f16"] == 512 * 8192 * 32 * 2
    assert sizes["f32"] < 8 * MIB


def test_recurrent_states_are_there_for_every_sequence(llama_1b: ModelSpec) -> None:
    """They come on top of the pool, as often as there may be sequences."""
    hybrid = msgspec.structs.replace(llama_1b, recurrent_state_bytes=3 * MIB)
    for sequences in (1, 16):
        kv_bytes = [terms_of(s, max_sequences=sequences).kv_bytes for s in (hybrid, llama_1b)]
        assert kv_bytes[0] - kv_bytes[1] == sequences * 3 * MIB


def test_windows_save_memory_only_where_the_engine_is_told(llama_1b: ModelSpec) -> None:
    """llama.cpp keeps windowed layers in full unless told otherwise."""
    layers = tuple(
        KvLayer(key_width=512, value_width=512, window_tokens=1024 if index % 2 else None)
        for index in range(16)
    )
    spec = msgspec.structs.replace(llama_1b, kv_layers=layers)
    full = terms_of(spec, kv_tokens=32_768)
    short = terms_of(spec, kv_tokens=32_768, full_windows=False)
    assert full.kv_bytes == 32_768 * 32_768
    assert short.kv_bytes == (32_768 + 1536) * 32_768 // 2


def test_a_gpu_has_a_second_buffer_and_no_work_buffer(llama_1b: ModelSpec) -> None:
    """Embeddings and mask stand on the CPU's side as well."""
    cpu, gpu = terms_of(llama_1b), terms_of(llama_1b, on_gpu=True)
    assert gpu.compute_bytes - cpu.compute_bytes == 512 * (8 * 2048 + 2 * 1024)
    assert gpu.overhead_bytes < cpu.overhead_bytes


def test_mlx_maps_nothing(llama_1b: ModelSpec) -> None:
    """Its weights are anonymous memory, there is no second copy, and each sequence has a buffer."""
    terms = terms_of(llama_1b, engine="mlx", kv_tokens=1000, max_sequences=2)
    assert (terms.mapped_bytes, terms.repacked_bytes) == (0, 0)
    assert terms.weights_bytes == llama_1b.weights_bytes
    # Two sequences that share out the pool may each leave most of a block of 64 unused.
    assert terms.kv_bytes == (1024 + 64) * 32768
    assert terms.compute_touched_bytes <= terms.compute_bytes


def test_a_draft_has_no_process_of_its_own(llama_1b: ModelSpec) -> None:
    """A pair takes both models' terms, and the interpreter once."""
    target, draft = terms_of(llama_1b), terms_of(llama_1b, is_draft=True)
    pair = target.with_draft(draft)
    assert pair.total_bytes == 2 * target.total_bytes - WORKER_OVERHEAD_BYTES
    assert pair.kv_bytes == 2 * target.kv_bytes
    assert pair.resident_bytes == target.resident_bytes + draft.resident_bytes


@pytest.mark.parametrize("quant", ["Q4_K_M", "F16"])
@pytest.mark.parametrize("engine", ["llamacpp", "mlx"])
@pytest.mark.parametrize(
    "absurd",
    [
        {"num_parameters": 1},
        {"num_layers": 1, "num_kv_heads": ()},
        {"num_heads": 0, "num_kv_heads": (0,) * 16, "key_dim": 0, "value_dim": 0},
        {"weights_bytes": 0, "feed_forward_size": 0},
        {"vocab_size": 2**24, "feed_forward_size": 2**24},
        {"num_recurrent_layers": 16, "num_kv_heads": (0,) * 16, "recurrent_state_bytes": 4},
        {"num_experts": 1, "num_active_experts": 1},
    ],
)
def test_no_header_makes_a_term_negative(
    llama_1b: ModelSpec, absurd: dict[str, Any], engine: str, quant: str
) -> None:
    """Whatever a header says, nothing is forecast to give memory back, and a process costs some."""
    spec = msgspec.structs.replace(llama_1b, quant=quant, kv_layers=(), **absurd)
    kv_type = "q8_0" if engine == "llamacpp" or "q8_0" in mlx_kv_types(spec) else "f16"
    terms = terms_of(
        spec, engine=engine, kv_tokens=1, micro_batch_tokens=1, kv_type_k=kv_type, kv_type_v=kv_type
    )
    assert min(msgspec.structs.asdict(terms).values()) >= 0
    assert terms.total_bytes >= 40 * MIB


def test_unknown_engine_is_refused(llama_1b: ModelSpec) -> None:
    """There is no forecast for an engine that the planner does not know."""
    with pytest.raises(ConfigError, match="no memory forecast for an engine named 'x'"):
        terms_of(llama_1b, engine="x")
