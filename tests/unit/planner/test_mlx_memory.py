"""What MLX computes with: which parts of a model its scratch memory is made of."""

from typing import Any

import msgspec
import pytest

from brim.core.model import KvLayer, ModelSpec
from brim.planner.mlx_kv import attention_is_fused
from brim.planner.mlx_memory import activation_bytes, mlx_terms

OPTIONS: dict[str, Any] = {
    "kv_tokens": 2048, "max_sequences": 1, "kv_type_k": "f16", "kv_type_v": "f16",
    "micro_batch_tokens": 512, "on_gpu": True,
}  # fmt: skip


def in_use(spec: ModelSpec) -> int:
    return activation_bytes(spec, num_rows=512, kv_tokens=2048, kv_type="f16", on_gpu=True)


def test_every_sequence_has_rows_of_logits(llama_1b: ModelSpec) -> None:
    """Six rows of the vocabulary in f32 for each, in use and again among freed arrays."""
    one, three = (
        mlx_terms(llama_1b, **OPTIONS | {"max_sequences": num}).compute_bytes for num in (1, 3)
    )
    assert three - one == 2 * 2 * 6 * 4 * llama_1b.vocab_size


def test_a_load_peaks_at_the_weights_and_one_layer(llama_1b: ModelSpec) -> None:
    """While a layer is stacked or cast it is there twice, beside the process itself."""
    terms = mlx_terms(llama_1b, **OPTIONS)
    layer_bytes = llama_1b.weights_bytes // 16
    assert terms.load_peak_bytes == terms.overhead_bytes + llama_1b.weights_bytes + layer_bytes


def test_a_scan_takes_matrices_of_its_own(llama_1b: ModelSpec) -> None:
    """Recurrent layers add eight of heads x 256 x 256 and rows of their width; Mamba 1 has none."""
    widths = {"ssm.time_step_rank": 16, "ssm.inner_size": 1024}
    recurrent = msgspec.structs.replace(llama_1b, num_recurrent_layers=4, widths=widths)
    scanned = in_use(recurrent) - in_use(llama_1b)
    assert scanned == 4 * (8 * 16 * 256**2 + 4 * 512 * 1024)
    first = msgspec.structs.replace(recurrent, architecture="mamba")
    assert in_use(first) == in_use(llama_1b)


def test_a_compressed_cache_is_unpacked_for_a_piece(llama_1b: ModelSpec) -> None:
    """Keys and values of every head are made of what MLA stores, over the whole context."""
    widths = {"attention.key_length_mla": 192, "attention.value_length_mla": 128}
    latent = msgspec.structs.replace(
        llama_1b, kv_layers=(KvLayer(key_width=576, value_width=0),) * 16
    )
    whole = msgspec.structs.replace(latent, widths=widths)
    assert in_use(whole) - in_use(latent) == 32 * 2048 * (192 + 128) * 2


@pytest.mark.parametrize(
    "changes",
    [{"value_dim": 80}, {"widths": {"attention.kv_lora_rank": 512}}, {"key_dim": 96}],
)
def test_scores_are_an_array_where_no_kernel_fuses_them(
    llama_1b: ModelSpec, changes: dict[str, Any]
) -> None:
    """Keys as wide as values of a covered width, and no MLA: all else computes scores in memory."""
    spec = msgspec.structs.replace(llama_1b, **changes)
    assert not attention_is_fused(spec, kv_type="f16", on_gpu=True)
    assert attention_is_fused(llama_1b, kv_type="f16", on_gpu=True)
