"""From a model's description to its graph: which architectures differ in what they compute.

An architecture that is not named here is taken for the usual transformer: separate Q, K and V,
rotated positions, a gated feed-forward.  The tables hold only what changes how much lives at once.
"""

from brim.core.model import KvLayer, ModelSpec
from brim.planner.kv import kv_layers
from brim.planner.scratch.layers import (
    Attention,
    DeltaNet,
    FeedForward,
    GraphModel,
    Latent,
    Layer,
    Mamba,
    OutputCut,
    Recurrent,
    ShortConvolution,
)

FUSED_QKV = frozenset({
    "bloom", "chatglm", "codeshell", "dbrx", "falcon", "gpt2", "gptneox", "jais", "mpt", "phi2",
    "phi3", "qwen", "starcoder",
})  # fmt: skip
FUSED_GATE_AND_UP = frozenset({"chatglm", "glm4", "phi3", "plamo3"})
WITHOUT_GATE = frozenset({
    "arcee", "bloom", "codeshell", "falcon", "gpt2", "gptneox", "jais2", "mpt", "nemotron",
    "nemotron_h", "nemotron_h_moe", "phi2", "starcoder", "starcoder2",
})  # fmt: skip
WITHOUT_POSITIONS = frozenset({
    "bloom", "gpt2", "granitehybrid", "jais", "jamba", "mpt", "nemotron_h", "nemotron_h_moe",
    "starcoder",
})  # fmt: skip
PARALLEL_FEED_FORWARD = frozenset({
    "codeshell", "cohere2", "cohere2moe", "command-r", "falcon", "gptneox", "phi2", "plamo",
})  # fmt: skip
ADDING_TO_STREAM = frozenset({"jamba", "lfm2", "lfm2moe", "openelm", "phi3"})
DELTA_NETS = frozenset({"qwen3next", "qwen35", "qwen35moe"})
OUTPUT_CUTS = {
    "gpt-oss": OutputCut.STREAM,
    "step35": OutputCut.STREAM,
    "cohere2moe": OutputCut.NORMED,
    "gemma4": OutputCut.NORMED,
    "hy_v3": OutputCut.NORMED,
    "nemotron_h": OutputCut.NORMED,
    "nemotron_h_moe": OutputCut.NORMED,
    "qwen3next": OutputCut.NORMED,
    "qwen35": OutputCut.NORMED,
    "qwen35moe": OutputCut.NORMED,
}

SAMPLED_LAYERS = 4
"""Of each kind, where a graph has more.  What lives where repeats from the third layer on: with 3,
17 shapes at 8 batches have the buffer of all their layers, with 2 DeepSeek V2 Lite's is 9 MiB
short."""

DEEPSEEK_LATENT = Latent(query_rank=1536, kv_rank=512, rope_dim=64, key_dim=192, value_dim=128)
"""Where a description has latent KV but not its widths: those of DeepSeek V2 and V3."""


def graph_model(spec: ModelSpec) -> GraphModel:
    """The graph's view of a model, with a few layers that stand for all."""
    layers = tuple(_layer(spec, index, kv) for index, kv in enumerate(kv_layers(spec)))
    return GraphModel(
        hidden=spec.hidden_size,
        vocab=spec.vocab_size,
        layers=_sample(layers),
        widest_value=max((layer.value_width for layer in kv_layers(spec)), default=0),
        adds_to_stream=spec.architecture in ADDING_TO_STREAM,
        output_cut=OUTPUT_CUTS.get(spec.architecture, OutputCut.LAST_LAYER),
        per_layer_width=spec.widths.get("embedding_length_per_layer_input", 0),
        num_layers=spec.num_layers,
    )


def _sample(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    seen: dict[Layer, int] = {}
    kept = []
    for index, layer in enumerate(layers):
        seen[layer] = seen.get(layer, 0) + 1
        if seen[layer] <= SAMPLED_LAYERS or index == len(layers) - 1:
            kept.append(layer)
    return tuple(kept)


def _layer(spec: ModelSpec, index: int, kv: KvLayer) -> Layer:
    architecture = spec.architecture
    num_kv_heads = spec.num_kv_heads[index] if index < len(spec.num_kv_heads) else 0
    attends = bool(kv.key_width or num_kv_heads)
    is_recurrent = bool(spec.num_recurrent_layers) and (
        not attends or spec.num_recurrent_layers == spec.num_layers
    )
    return Layer(
        attention=_attention(spec, kv, num_kv_heads) if attends else None,
        recurrent=_recurrent(spec) if is_recurrent else None,
        feed_forward=_feed_forward(spec, index, is_alone=not attends and not is_recurrent),
        is_parallel=architecture in PARALLEL_FEED_FORWARD,
    )


def _attention(spec: ModelSpec, kv: KvLayer, num_kv_heads: int) -> Attention:
    architecture = spec.architecture
    # Layers with windows may have heads of another width (Gemma 4); one KV head is MLA's.
    heads = max(1, num_kv_heads)
    key_dim = kv.key_width // heads if kv.key_width else spec.key_dim
    return Attention(
        num_heads=spec.num_heads,
        num_kv_heads=heads,
        key_dim=key_dim,
        value_dim=kv.value_width // heads if kv.value_width else spec.value_dim,
        has_window=kv.window_tokens is not None,
        is_fused=architecture in FUSED_QKV,
        is_gated=architecture in DELTA_NETS,
        has_positions=architecture not in WITHOUT_POSITIONS,
        norms_value=architecture == "gemma4",
        stores_kv=bool(kv.key_width),
        latent=_latent(spec) if kv.key_width and not kv.value_width else None,
    )


def _latent(spec: ModelSpec) -> Latent:
    known, widths = DEEPSEEK_LATENT, spec.widths
    if "attention.kv_lora_rank" not in widths:
        return known
    return Latent(
        query_rank=widths.get("attention.q_lora_rank", 0),
        kv_rank=widths["attention.kv_lora_rank"],
        rope_dim=widths.get("rope.dimension_count", known.rope_dim),
        key_dim=widths.get("attention.key_length_mla", known.key_dim),
        value_dim=widths.get("attention.value_length_mla", known.value_dim),
    )


def _recurrent(spec: ModelSpec) -> Recurrent:
    widths = spec.widths
    kernel = widths.get("ssm.conv_kernel", 4)
    if spec.architecture in DELTA_NETS:
        return DeltaNet(
            num_key_heads=widths.get("ssm.group_count", 16),
            num_value_heads=widths.get("ssm.time_step_rank", 32),
            head_dim=widths.get("ssm.state_size", 128),
            kernel=kernel,
            repeats_keys=True,
        )
    if "shortconv.l_cache" in widths or spec.architecture.startswith("lfm2"):
        return ShortConvolution(kernel=widths.get("shortconv.l_cache", 3))
    return Mamba(
        # Mamba's own proportions, where a description does not give its widths.
        inner=widths.get("ssm.inner_size", 2 * spec.hidden_size),
        state=widths.get("ssm.state_size", 16),
        kernel=kernel,
        step_rank=widths.get("ssm.time_step_rank", spec.hidden_size // 16),
        num_groups=widths.get("ssm.group_count", 0),
    )


def _feed_forward(spec: ModelSpec, index: int, *, is_alone: bool) -> FeedForward | None:
    widths, architecture = spec.widths, spec.architecture
    if not spec.feed_forward_size:
        return None
    if architecture.startswith("nemotron_h") and not is_alone:
        return None
    gated = architecture not in WITHOUT_GATE
    if not spec.num_experts or index < widths.get("leading_dense_block_count", 0):
        return FeedForward(
            width=spec.feed_forward_size,
            is_gated=gated,
            is_fused=architecture in FUSED_GATE_AND_UP,
        )
    width = widths.get("expert_feed_forward_length", spec.feed_forward_size)
    shared = widths.get("expert_shared_count", 0) * width
    return FeedForward(
        width=width,
        is_gated=gated,
        num_experts=spec.num_experts,
        # A header may leave out how many it uses: none would be no graph at all.
        num_active_experts=max(1, spec.num_active_experts),
        shared_width=widths.get("expert_shared_feed_forward_length", shared),
        has_bias=architecture == "gpt-oss",
    )
