"""Tensors of one layer, by architecture: names without the 'blk.N.' before them, and shapes.

Shapes are ggml's: row length first.  The functions follow the order of the published files.
"""

from collections.abc import Iterator

from brim.bench.standin.dimensions import Dimensions

Shaped = tuple[str, tuple[int, ...]]


def rope_factors(d: Dimensions) -> Iterator[Shaped]:
    """The frequency factors that stand once in a file, for all layers."""
    if d.has_rope_factors:
        half = (d.head_dim // 2,)
        names = ("rope_factors_long", "rope_factors_short") if d.architecture == "phi3" else None
        yield from ((f"{name}.weight", half) for name in names or ("rope_freqs",))


def llama(d: Dimensions, layer: int) -> Iterator[Shaped]:
    """Llama and its kin (Mistral, Mixtral, Qwen2 and 3, SmolLM3): biases and norms differ."""
    yield "attn_norm.weight", (d.hidden_size,)
    yield from _attention(d)
    if d.architecture.startswith("qwen3"):
        yield from _head_norms(d)
    yield "ffn_norm.weight", (d.hidden_size,)
    yield from _experts(d) if d.num_experts else _feed_forward(d)


def gemma(d: Dimensions, layer: int) -> Iterator[Shaped]:
    """Gemma 2 and 3: norms after attention and feed-forward as well."""
    yield "attn_norm.weight", (d.hidden_size,)
    yield from _attention(d)
    if d.architecture == "gemma3":
        yield from _head_norms(d)
    yield "post_attention_norm.weight", (d.hidden_size,)
    yield "ffn_norm.weight", (d.hidden_size,)
    yield from _feed_forward(d)
    yield "post_ffw_norm.weight", (d.hidden_size,)


def phi3(d: Dimensions, layer: int) -> Iterator[Shaped]:
    """Phi-3: one matrix for query, key and value, one for gate and up."""
    width = d.head_dim * (d.num_heads + 2 * d.num_kv_heads)
    yield "attn_norm.weight", (d.hidden_size,)
    yield "attn_qkv.weight", (d.hidden_size, width)
    yield "attn_output.weight", (d.head_dim * d.num_heads, d.hidden_size)
    yield "ffn_norm.weight", (d.hidden_size,)
    yield "ffn_down.weight", (d.feed_forward_size, d.hidden_size)
    yield "ffn_up.weight", (d.hidden_size, 2 * d.feed_forward_size)


def gpt_oss(d: Dimensions, layer: int) -> Iterator[Shaped]:
    """gpt-oss: biases everywhere, and a sink for each head."""
    inner, experts = d.expert_feed_forward_size, d.num_experts
    yield "attn_norm.weight", (d.hidden_size,)
    yield from _attention(d)
    yield "attn_output.bias", (d.hidden_size,)
    yield "attn_sinks.weight", (d.num_heads,)
    yield "post_attention_norm.weight", (d.hidden_size,)
    yield from _experts(d)
    yield "ffn_gate_inp.bias", (experts,)
    yield "ffn_gate_exps.bias", (inner, experts)
    yield "ffn_up_exps.bias", (inner, experts)
    yield "ffn_down_exps.bias", (d.hidden_size, experts)


def deepseek2(d: Dimensions, layer: int) -> Iterator[Shaped]:
    """DeepSeek-V2 and V3: compressed queries and KV (MLA), shared and routed experts."""
    unrotated = d.head_dim - d.rope_head_dim
    yield "attn_norm.weight", (d.hidden_size,)
    if d.q_lora_rank:
        yield "attn_q_a.weight", (d.hidden_size, d.q_lora_rank)
        yield "attn_q_a_norm.weight", (d.q_lora_rank,)
        yield "attn_q_b.weight", (d.q_lora_rank, d.num_heads * d.head_dim)
    else:
        yield "attn_q.weight", (d.hidden_size, d.num_heads * d.head_dim)
    yield "attn_kv_a_mqa.weight", (d.hidden_size, d.kv_lora_rank + d.rope_head_dim)
    yield "attn_kv_a_norm.weight", (d.kv_lora_rank,)
    yield "attn_k_b.weight", (unrotated, d.kv_lora_rank, d.num_heads)
    yield "attn_v_b.weight", (d.kv_lora_rank, d.value_head_dim, d.num_heads)
    yield "attn_output.weight", (d.num_heads * d.value_head_dim, d.hidden_size)
    yield "ffn_norm.weight", (d.hidden_size,)
    if layer < d.num_leading_dense_layers:
        yield from _feed_forward(d)
        return
    yield from _experts(d)
    yield from _shared_experts(d)
    # Routers of the V3 generation, which compresses queries, choose with a bias.
    if d.q_lora_rank:
        yield "exp_probs_b.bias", (d.num_experts,)


def glm4moe(d: Dimensions, layer: int) -> Iterator[Shaped]:
    """GLM-4.5 and later: dense layers first, then shared and routed experts."""
    yield "attn_norm.weight", (d.hidden_size,)
    yield from _attention(d)
    if d.has_head_norms:
        yield from _head_norms(d)
    yield "post_attention_norm.weight", (d.hidden_size,)
    if layer < d.num_leading_dense_layers:
        yield from _feed_forward(d)
        return
    yield from _experts(d)
    yield "exp_probs_b.bias", (d.num_experts,)
    yield from _shared_experts(d)


def mamba(d: Dimensions, layer: int) -> Iterator[Shaped]:
    """Mamba: a recurrent state, no attention and no feed-forward."""
    yield "attn_norm.weight", (d.hidden_size,)
    yield from _mamba_mixer(d)


def jamba(d: Dimensions, layer: int) -> Iterator[Shaped]:
    """Jamba: Mamba layers, with attention in between."""
    yield "attn_norm.weight", (d.hidden_size,)
    if layer in d.recurrent_layers:
        yield from _mamba_mixer(d)
        yield "ssm_dt_norm.weight", (d.time_step_rank,)
        yield "ssm_b_norm.weight", (d.state_size,)
        yield "ssm_c_norm.weight", (d.state_size,)
    else:
        yield from _attention(d)
    yield "ffn_norm.weight", (d.hidden_size,)
    yield from _feed_forward(d)


def falcon_h1(d: Dimensions, layer: int) -> Iterator[Shaped]:
    """Falcon-H1: attention and a Mamba 2 state side by side in every layer."""
    convolved = d.inner_size + 2 * d.group_count * d.state_size
    yield "attn_norm.weight", (d.hidden_size,)
    yield "ssm_in.weight", (d.hidden_size, d.inner_size + convolved + d.time_step_rank)
    yield "ssm_conv1d.weight", (d.conv_kernel, convolved)
    yield "ssm_conv1d.bias", (convolved,)
    yield "ssm_dt.bias", (d.time_step_rank,)
    yield "ssm_a", (1, d.time_step_rank)
    yield "ssm_d", (1, d.time_step_rank)
    yield "ssm_out.weight", (d.inner_size, d.hidden_size)
    yield from _attention(d)
    # The loader asks for this one without a suffix.
    yield "ffn_norm", (d.hidden_size,)
    yield from _feed_forward(d)


def lfm2(d: Dimensions, layer: int) -> Iterator[Shaped]:
    """LFM2: short convolutions, with attention in between."""
    yield "attn_norm.weight", (d.hidden_size,)
    if layer in d.recurrent_layers:
        yield "shortconv.conv.weight", (d.conv_kernel, d.hidden_size)
        yield "shortconv.in_proj.weight", (d.hidden_size, 3 * d.hidden_size)
        yield "shortconv.out_proj.weight", (d.hidden_size, d.hidden_size)
    else:
        yield from _attention(d)
        yield from _head_norms(d)
    yield "ffn_norm.weight", (d.hidden_size,)
    yield from _feed_forward(d)


def qwen3next(d: Dimensions, layer: int) -> Iterator[Shaped]:
    """Qwen3-Next and Qwen3.5: gated delta nets, with gated attention in between."""
    yield "attn_norm.weight", (d.hidden_size,)
    if layer in d.recurrent_layers:
        values = d.state_size * d.time_step_rank
        convolved = 2 * d.state_size * d.group_count + values
        yield "attn_qkv.weight", (d.hidden_size, convolved)
        yield "attn_gate.weight", (d.hidden_size, values)
        yield "ssm_conv1d.weight", (d.conv_kernel, convolved)
        yield "ssm_dt.bias", (d.time_step_rank,)
        yield "ssm_a", (d.time_step_rank,)
        if d.architecture == "qwen3next":
            yield "ssm_ba.weight", (d.hidden_size, 2 * d.time_step_rank)
        else:
            yield "ssm_beta.weight", (d.hidden_size, d.time_step_rank)
            yield "ssm_alpha.weight", (d.hidden_size, d.time_step_rank)
        yield "ssm_norm.weight", (d.state_size,)
        yield "ssm_out.weight", (values, d.hidden_size)
    else:
        # Half of the query matrix makes the gate.
        yield "attn_q.weight", (d.hidden_size, 2 * d.num_heads * d.head_dim)
        yield "attn_k.weight", (d.hidden_size, d.num_kv_heads * d.head_dim)
        yield "attn_v.weight", (d.hidden_size, d.num_kv_heads * d.head_dim)
        yield "attn_output.weight", (d.num_heads * d.head_dim, d.hidden_size)
        yield from _head_norms(d)
    yield "post_attention_norm.weight", (d.hidden_size,)
    if not d.num_experts:
        yield from _feed_forward(d)
        return
    yield from _experts(d)
    yield "ffn_gate_inp_shexp.weight", (d.hidden_size,)
    yield from _shared_experts(d)


# --- parts -------------------------------------------------------------------------------------


def _attention(d: Dimensions) -> Iterator[Shaped]:
    queries, keys = d.num_heads * d.head_dim, d.num_kv_heads * d.head_dim
    for name, width in (("attn_q", queries), ("attn_k", keys), ("attn_v", keys)):
        yield f"{name}.weight", (d.hidden_size, width)
        if d.has_qkv_bias:
            yield f"{name}.bias", (width,)
    yield "attn_output.weight", (queries, d.hidden_size)


def _head_norms(d: Dimensions) -> Iterator[Shaped]:
    yield "attn_q_norm.weight", (d.head_dim,)
    yield "attn_k_norm.weight", (d.head_dim,)


def _feed_forward(d: Dimensions) -> Iterator[Shaped]:
    yield "ffn_gate.weight", (d.hidden_size, d.feed_forward_size)
    yield "ffn_up.weight", (d.hidden_size, d.feed_forward_size)
    yield "ffn_down.weight", (d.feed_forward_size, d.hidden_size)


def _experts(d: Dimensions) -> Iterator[Shaped]:
    inner = d.expert_feed_forward_size or d.feed_forward_size
    yield "ffn_gate_inp.weight", (d.hidden_size, d.num_experts)
    yield "ffn_gate_exps.weight", (d.hidden_size, inner, d.num_experts)
    yield "ffn_up_exps.weight", (d.hidden_size, inner, d.num_experts)
    yield "ffn_down_exps.weight", (inner, d.hidden_size, d.num_experts)


def _shared_experts(d: Dimensions) -> Iterator[Shaped]:
    inner = d.expert_feed_forward_size * d.num_shared_experts
    yield "ffn_gate_shexp.weight", (d.hidden_size, inner)
    yield "ffn_up_shexp.weight", (d.hidden_size, inner)
    yield "ffn_down_shexp.weight", (inner, d.hidden_size)


def _mamba_mixer(d: Dimensions) -> Iterator[Shaped]:
    yield "ssm_in.weight", (d.hidden_size, 2 * d.inner_size)
    yield "ssm_conv1d.weight", (d.conv_kernel, d.inner_size)
    yield "ssm_conv1d.bias", (d.inner_size,)
    yield "ssm_x.weight", (d.inner_size, d.time_step_rank + 2 * d.state_size)
    yield "ssm_dt.weight", (d.time_step_rank, d.inner_size)
    yield "ssm_dt.bias", (d.inner_size,)
    yield "ssm_a", (d.state_size, d.inner_size)
    yield "ssm_d", (d.inner_size,)
    yield "ssm_out.weight", (d.inner_size, d.hidden_size)
