"""Which architectures a config.json can name, and what its keys do not say about each.

One row for each `model_type` of transformers: llama.cpp's name for it and the few facts of its
code that decide tensors.  A new architecture that is built like one of these needs only a row.
"""

from typing import NamedTuple


class Family(NamedTuple):
    """What of an architecture stands in its code rather than in its config."""

    architecture: str
    """llama.cpp's name."""
    is_tied: bool = False
    """Whether the output matrix is the embedding where the config does not say."""
    is_qkv_fused: bool = False
    """Whether one matrix makes queries, keys and values."""
    is_gate_fused: bool = False
    """Whether one matrix makes a feed-forward's gate and its product's other factor."""
    has_gate: bool = True
    """Whether a feed-forward has a gate at all."""
    has_query_gate: bool = False
    """Whether the query matrix also makes a gate for attention's result."""
    has_positions: bool = False
    """Whether positions are looked up in a table."""


FAMILIES = {
    "afmoe": Family("afmoe", has_query_gate=True),
    "apertus": Family("apertus", has_gate=False),
    "arcee": Family("arcee", has_gate=False),
    "bailing_moe": Family("bailingmoe", is_qkv_fused=True),
    "bailing_moe_v2": Family("bailingmoe2", is_qkv_fused=True),
    "bert": Family("bert", is_tied=True, has_gate=False, has_positions=True),
    "cohere": Family("command-r", is_tied=True),
    "cohere2": Family("cohere2", is_tied=True),
    "deepseek_v2": Family("deepseek2"),
    "deepseek_v3": Family("deepseek2"),
    "deepseek_v32": Family("deepseek32"),
    "dots1": Family("dots1"),
    "ernie4_5": Family("ernie4_5", is_tied=True),
    "ernie4_5_moe": Family("ernie4_5-moe", is_tied=True),
    "exaone4": Family("exaone4"),
    "falcon_h1": Family("falcon-h1"),
    "falcon_mamba": Family("mamba", is_tied=True),
    "gemma": Family("gemma", is_tied=True),
    "gemma2": Family("gemma2", is_tied=True),
    "gemma3": Family("gemma3", is_tied=True),
    "gemma3n": Family("gemma3n", is_tied=True),
    "gemma4": Family("gemma4", is_tied=True),
    "glm4": Family("glm4", is_gate_fused=True),
    "glm4_moe": Family("glm4moe"),
    "glm4_moe_lite": Family("deepseek2"),
    "glm_moe_dsa": Family("glm-dsa"),
    "gpt_oss": Family("gpt-oss"),
    "granite": Family("granite"),
    "granitemoe": Family("granitemoe"),
    "granitemoehybrid": Family("granitehybrid"),
    "hunyuan_v1_dense": Family("hunyuan-dense"),
    "hunyuan_v1_moe": Family("hunyuan-moe"),
    "kimi_k2": Family("deepseek2"),
    "kimi_k25": Family("deepseek2"),
    "kimi_linear": Family("kimi-linear"),
    "lfm2": Family("lfm2", is_tied=True),
    "lfm2_moe": Family("lfm2moe", is_tied=True),
    "llama": Family("llama"),
    "llama4": Family("llama4"),
    "mamba": Family("mamba", is_tied=True),
    "mamba2": Family("mamba2", is_tied=True),
    "minimax": Family("minimax-m2"),
    "minimax_m2": Family("minimax-m2"),
    "ministral3": Family("mistral3"),
    "mistral": Family("llama"),
    "mistral3": Family("mistral3"),
    "mixtral": Family("llama"),
    "nemotron": Family("nemotron", has_gate=False),
    "nemotron_h": Family("nemotron_h", has_gate=False),
    "nomic_bert": Family("nomic-bert", is_tied=True),
    "olmo2": Family("olmo2"),
    "olmo3": Family("olmo2"),
    "olmoe": Family("olmoe"),
    "phi3": Family("phi3", is_qkv_fused=True, is_gate_fused=True),
    "phimoe": Family("phimoe"),
    "qwen2": Family("qwen2"),
    "qwen2_5_vl": Family("qwen2vl"),
    "qwen2_moe": Family("qwen2moe"),
    "qwen2_vl": Family("qwen2vl"),
    "qwen3": Family("qwen3"),
    "qwen3_5": Family("qwen35", has_query_gate=True),
    "qwen3_5_moe": Family("qwen35moe", has_query_gate=True),
    "qwen3_moe": Family("qwen3moe"),
    "qwen3_next": Family("qwen3next", has_query_gate=True),
    "qwen3_vl": Family("qwen3vl"),
    "qwen3_vl_moe": Family("qwen3vlmoe"),
    "seed_oss": Family("seed_oss"),
    "smollm3": Family("smollm3", is_tied=True),
    "solar_open": Family("glm4moe"),
    "starcoder2": Family("starcoder2", is_tied=True, has_gate=False),
    "xlm-roberta": Family("bert", is_tied=True, has_gate=False, has_positions=True),
}
"""`model_type` -> family."""

EXPANDED_LATENT = frozenset({"deepseek_v2", "minicpm3"})
"""`model_type`s of MLA whose classes in mlx-lm keep keys and values of every head; the others keep
the compressed vector, a tenth as large, as llama.cpp does for all."""

WITHOUT_MERGES = frozenset({
    "gemma", "gemma2", "gemma3", "gemma3n", "bert", "nomic-bert",
})  # fmt: skip
"""Architectures whose vocabularies are SentencePiece's or WordPiece's: no merges in a GGUF file."""

MAX_PIECES = 33_000
"""Up to here a vocabulary is taken for SentencePiece's too: Llama 2, Mixtral and Phi-3 have 32,000
to 32,768 tokens.  Byte-pair vocabularies as small have so few merges that it does not matter."""


def has_merges(architecture: str, vocab_size: int) -> bool:
    """Whether a model's GGUF file holds a byte-pair vocabulary with its merges."""
    return architecture not in WITHOUT_MERGES and vocab_size > MAX_PIECES


def is_listed(architecture: str) -> bool:
    """Whether llama.cpp's name is one of a listed family, whose shape is not guessed."""
    return any(family.architecture == architecture for family in FAMILIES.values())


def family_of(model_type: str) -> Family:
    """The family of a `model_type`; one that is not listed is taken for a plain transformer."""
    return FAMILIES.get(model_type) or Family(model_type.replace("_", ""))
