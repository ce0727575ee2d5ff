"""Lays out a model from its config: the tensors and keys that its GGUF file would have.

The names are llama.cpp's, so that one set of rules (quant recipes, KV of each layer, active
weights) serves files and configs alike.  Biases and the smallest vectors are left out: together
they are under 0.1 % of any model listed in `families`.

Source: `load_arch_tensors` of llama.cpp's architectures; parameters are compared with mlx-lm's
classes in tests/integration/test_configs_match_mlx.py.
"""

from typing import Any

from brim.registry import mixers
from brim.registry.config_reader import Config
from brim.registry.families import Family, family_of
from brim.registry.gguf_header import GgufArray, Scalar

MAX_LAYERS = 1_024
"""llama.cpp stops at 512; a config that says more is no model's."""

EXPERT_COUNTS = (
    "n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts", "n_experts",
)  # fmt: skip

ACTIVE_COUNTS = (
    "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts",
)  # fmt: skip


class ConfigLayout:
    """The tensors and keys of one model.

    Args:
        config: Its config.

    Raises:
        ModelFileError: The config lacks a key.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.family: Family = family_of(config.model_type)
        self.hidden_size = config.number("hidden_size", "d_model", "n_embd", "model_dim")
        self.num_layers = _num_layers(config)
        self.vocab_size = config.number("vocab_size")
        self.num_experts = config.number(*EXPERT_COUNTS, default=0)
        self.num_heads = config.number("num_attention_heads", "n_head", default=0)
        # Some configs give none where every head has its own.
        self.num_kv_heads = config.number("num_key_value_heads", default=0) or self.num_heads
        self.shapes: list[tuple[str, tuple[int, ...]]] = []
        self.metadata: dict[str, Scalar | GgufArray] = {}
        self._kinds = mixers.kinds_of_layers(config, self.num_layers)
        self._lay_out()

    # --- what mixers use -----------------------------------------------------------------------

    def add(self, name: str, *shape: int) -> None:
        """A tensor; empty ones are left out, as where a model has no such part."""
        if 0 not in shape:
            self.shapes.append((f"{name}.weight", shape))

    def key(self, name: str, value: Any) -> None:
        """A key of the architecture; a list becomes an array with an item for each layer."""
        if isinstance(value, list):
            value = GgufArray(len(value), tuple(value))
        self.metadata[f"{self.family.architecture}.{name}"] = value

    # --- the whole -----------------------------------------------------------------------------

    def _lay_out(self) -> None:
        config, hidden = self.config, self.hidden_size
        self.metadata["general.architecture"] = self.family.architecture
        self.key("block_count", self.num_layers)
        self.key("embedding_length", hidden)
        self.key("context_length", _context_tokens(config))
        self.key("vocab_size", self.vocab_size)
        self.key("attention.head_count", self.num_heads)
        self.add("token_embd", hidden, self.vocab_size)
        if not config.flag("tie_word_embeddings", self.family.is_tied):
            self.add("output", hidden, self.vocab_size)
        if self.family.has_positions:
            self.add("position_embd", hidden, config.number("max_position_embeddings"))
        self.add("output_norm", hidden)
        for layer, kind in enumerate(self._kinds):
            self.add(f"blk.{layer}.attn_norm", hidden)
            for part in kind.split("+"):
                mixers.MIXERS[part](self, layer)
            if self._has_feed_forward(kind):
                self._feed_forward(layer)
        mixers.describe_layers(self, self._kinds)
        self._per_layer_embeddings()
        self._describe_experts()

    def _describe_experts(self) -> None:
        if not self.num_experts:
            return
        self.key("expert_count", self.num_experts)
        self.key("expert_used_count", self.config.number(*ACTIVE_COUNTS))
        mixtures = [i for i in range(self.num_layers) if self._is_mixture(i)]
        if mixtures:
            size = self._expert_size(mixtures[0])
            self.key("expert_feed_forward_length", size)
            self.key("expert_shared_feed_forward_length", self._shared_size(size))
            self.key("expert_shared_count", self._num_shared_experts())
            # Only where all the dense layers lead.
            if mixtures == list(range(mixtures[0], self.num_layers)):
                self.key("leading_dense_block_count", mixtures[0])

    def _expert_size(self, layer: int) -> int:
        return self.config.for_layer(
            layer, "moe_intermediate_size", "expert_intermediate_size", "intermediate_size"
        )

    def _has_feed_forward(self, kind: str) -> bool:
        """Mamba's layers have none, and Nemotron-H's are either a mixer or a feed-forward."""
        if self.family.architecture in ("mamba", "mamba2"):
            return False
        return self.family.architecture != "nemotron_h" or kind in ("mlp", "moe")

    def _feed_forward(self, layer: int) -> None:
        hidden, blk = self.hidden_size, f"blk.{layer}"
        self.add(f"{blk}.ffn_norm", hidden)
        is_mixture = self._is_mixture(layer)
        # Gemma 4's mixtures keep their dense feed-forward beside the experts.
        if not is_mixture or self.config.flag("enable_moe_block"):
            self._gated(blk, "", self._dense_size(layer))
        if not is_mixture:
            return
        experts = self.num_experts
        size = self._expert_size(layer)
        # Nemotron 3's experts work in a narrower space.
        width = self.config.number("moe_latent_size", default=0) or hidden
        if width != hidden:
            self.add(f"{blk}.ffn_latent_down", hidden, width)
            self.add(f"{blk}.ffn_latent_up", width, hidden)
        self.add(f"{blk}.ffn_gate_inp", hidden, experts)
        if self.family.has_gate:
            self.add(f"{blk}.ffn_gate_exps", width, size, experts)
        self.add(f"{blk}.ffn_up_exps", width, size, experts)
        self.add(f"{blk}.ffn_down_exps", size, width, experts)
        self._gated(blk, "_shexp", self._shared_size(size))

    def _gated(self, blk: str, suffix: str, size: int) -> None:
        hidden = self.hidden_size
        is_fused = self.family.is_gate_fused and not suffix
        if self.family.has_gate and not is_fused:
            self.add(f"{blk}.ffn_gate{suffix}", hidden, size)
        self.add(f"{blk}.ffn_up{suffix}", hidden, size * (2 if is_fused else 1))
        self.add(f"{blk}.ffn_down{suffix}", size, hidden)

    def _is_mixture(self, layer: int) -> bool:
        config = self.config
        if not self.num_experts:
            return False
        if "moe" in self._kinds:
            return self._kinds[layer] == "moe"
        first = config.number(
            "first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", default=0
        )
        listed = config.numbers("moe_layer_freq")
        if listed:
            return layer < len(listed) and listed[layer] != 0
        step = config.number(
            "decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_freq",
            "moe_layer_interval", default=1,
        )  # fmt: skip
        is_listed = layer in config.numbers("mlp_only_layers")
        return layer >= first and not is_listed and (layer + 1) % max(1, step) == 0

    def _dense_size(self, layer: int) -> int:
        config = self.config
        if self.family.architecture == "granitehybrid":
            return config.number("shared_intermediate_size", "intermediate_size")
        size = config.for_layer(
            layer, "intermediate_size_mlp", "block_ff_dim", "intermediate_size", "ffn_dim",
            "n_inner", "ffn_hidden_size",
        )  # fmt: skip
        if self.family.architecture == "lfm2" and config.flag("block_auto_adjust_ff_dim", True):
            size = int(int(2 * size / 3) * config.real("block_ffn_dim_multiplier", 1.0))
            multiple = config.number("block_multiple_of", default=256) or 1
            size = -(-size // multiple) * multiple
        # Gemma 4's layers without keys of their own have twice the width.
        shares = layer >= self.num_layers - mixers.num_shared_kv(config) > 0
        return size * 2 if shares and config.flag("use_double_wide_mlp") else size

    def _shared_size(self, expert_size: int) -> int:
        """Width of the experts that every token uses; 0 for none."""
        config = self.config
        if self.family.architecture == "llama4":
            return expert_size
        if size := config.number(
            "moe_shared_expert_intermediate_size", "shared_expert_intermediate_size",
            "shared_intermediate_size", default=0,
        ):  # fmt: skip
            return size
        return self._num_shared_experts() * expert_size

    def _num_shared_experts(self) -> int:
        """Where the config counts them in widths of a routed one; else 0."""
        return self.config.number(
            "n_shared_experts", "num_shared_experts", "num_shared_expert",
            "moe_num_shared_experts", default=0,
        )  # fmt: skip

    def _per_layer_embeddings(self) -> None:
        """Gemma's tables with a row for each token and layer, and what is done with the rows."""
        width = self.config.number("hidden_size_per_layer_input", default=0)
        if not width:
            return
        hidden, layers = self.hidden_size, self.num_layers
        rows = self.config.number("vocab_size_per_layer_input", default=self.vocab_size)
        self.key("embedding_length_per_layer_input", width)
        self.add("per_layer_token_embd", width * layers, rows)
        self.add("per_layer_model_proj", hidden, width * layers)
        for layer in range(layers):
            self.add(f"blk.{layer}.inp_gate", hidden, width)
            self.add(f"blk.{layer}.proj", width, hidden)
        inputs, rank = (
            self.config.number(k, default=0) for k in ("altup_num_inputs", "laurel_rank")
        )
        if inputs:
            self.add("altup_proj", hidden, hidden, inputs - 1)
            self.add("altup_unembd_proj", hidden, hidden, inputs - 1)
        for layer in range(layers) if rank else ():
            self.add(f"blk.{layer}.laurel_l", hidden, rank)
            self.add(f"blk.{layer}.laurel_r", rank, hidden)


def _num_layers(config: Config) -> int:
    listed = config.words("layers_block_type", "layer_types")
    default = len(listed) if listed else None
    count = config.number("num_hidden_layers", "n_layer", "num_layers", default=default)
    if not 1 <= count <= MAX_LAYERS:
        raise config.lacks("num_hidden_layers between 1 and 1024")
    return count


def _context_tokens(config: Config) -> int:
    return max(1, config.number(
        "max_position_embeddings", "model_max_length", "n_positions", "max_seq_len",
        "seq_length", default=1 << 20,
    ))  # fmt: skip
