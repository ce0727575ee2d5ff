"""Which weights a token reads."""

from brim.registry.gguf_header import TensorInfo
from brim.registry.weights import WeightSums, sum_weights


def tensor(name: str, shape: tuple[int, ...], type_name: str = "Q8_0") -> TensorInfo:
    """A tensor of one byte a weight."""
    size = 1
    for side in shape:
        size *= side
    return TensorInfo(name, shape, type_name, 0, size)


def sums_of(*tensors: TensorInfo, experts: int = 0, active: int = 0) -> WeightSums:
    """Of a model with two layers."""
    return sum_weights(tensors, num_layers=2, num_experts=experts, num_active_experts=active)


EMBEDDING = tensor("token_embd.weight", (8, 100))


def test_an_embedding_beside_an_output_matrix_is_only_looked_up() -> None:
    """Of the table a token reads one row, so neither its bytes nor its matrix counts."""
    sums = sums_of(EMBEDDING, tensor("output.weight", (8, 100), "Q6_K"))
    assert (sums.weights_bytes, sums.active_bytes, sums.embedding_bytes) == (1600, 800, 800)
    assert sums.matrix_bytes == {"Q6_K": 800}


def test_a_tied_embedding_is_read_once() -> None:
    """Without an output matrix the embedding serves as one."""
    sums = sums_of(EMBEDDING, tensor("blk.0.attn_q.weight", (8, 8)))
    assert sums.active_bytes == sums.weights_bytes == 864
    assert sums.matrix_bytes == {"Q8_0": 864}


def test_tables_for_each_layer_are_only_looked_up() -> None:
    """Gemma's embeddings for each layer are never multiplied with, tied or not."""
    sums = sums_of(EMBEDDING, tensor("per_layer_token_embd.weight", (16, 100)))
    assert (sums.weights_bytes, sums.active_bytes) == (2400, 800)


def test_routed_experts_count_by_their_share() -> None:
    """Two of eight experts are read; the shared one, the router and norms always are."""
    sums = sums_of(
        EMBEDDING,
        tensor("output.weight", (8, 100)),
        tensor("blk.0.ffn_up_exps.weight", (8, 16, 8)),
        tensor("blk.1.ffn_down.7.weight", (16, 8)),
        tensor("blk.0.ffn_up_shexp.weight", (8, 16)),
        tensor("blk.0.ffn_gate_inp.weight", (8, 8)),
        tensor("blk.0.ffn_norm.weight", (8,)),
        experts=8,
        active=2,
    )
    assert sums.active_bytes == 800 + 1024 // 4 + 128 // 4 + 128 + 64 + 8
    assert sums.active_parameters == sums.active_bytes
    assert sums.matrix_bytes == {"Q8_0": 800 + 1024 + 128 + 128 + 64}


def test_norms_and_convolutions_are_no_matrices() -> None:
    """What is not multiplied as a matrix is read and has no place among matrices."""
    sums = sums_of(
        EMBEDDING,
        tensor("blk.0.ssm_conv1d.weight", (4, 8)),
        tensor("blk.0.ssm_norm.weight", (8, 2)),
        tensor("blk.0.ssm_out.weight", (8, 8), "F16"),
    )
    assert sums.matrix_bytes == {"Q8_0": 800, "F16": 64}
    assert sums.active_bytes == 800 + 32 + 16 + 64


def test_the_width_of_a_feed_forward() -> None:
    """It is a dense layer's where there is one, and an expert's otherwise."""
    expert = tensor("blk.0.ffn_down_exps.weight", (16, 8, 4))
    assert sums_of(expert).feed_forward_size == 16
    assert sums_of(expert, tensor("blk.1.ffn_down.weight", (48, 8))).feed_forward_size == 48
    assert sums_of(EMBEDDING).feed_forward_size == 0
