"""The models known by name: true to their publishers, and found however they are written."""

import re

import pytest

from brim.errors import NotFound
from brim.registry.catalogue import (
    CatalogueEntry,
    entries,
    find,
    perplexity_increase_percent,
    quality_cost,
    quant_quality,
)
from brim.registry.config_json import spec_from_config

ROUNDING = 0.025
"""Publishers round to two digits, and some count a vision tower in."""

HUB_BYTES = {
    # Repositories of text models alone, by the hub's index: exo's inference_model_cards, 2026-06.
    ("MiniMax-M2.7", "MLX 4bit"): 128_682_598_717,
    ("MiniMax-M2.7", "MLX 8bit"): 243_002_680_786,
    ("GLM-4.7", "MLX 4bit"): 198_556_925_568,
    ("NVIDIA-Nemotron-3-Nano-30B-A3B", "MLX 4bit"): 17_775_342_336,
    ("NVIDIA-Nemotron-3-Nano-30B-A3B", "MLX 6bit"): 25_667_611_392,
}

every_entry = pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry.name)


@every_entry
def test_the_config_gives_the_published_parameters(entry: CatalogueEntry) -> None:
    """Parameters counted from a config are those that its publisher states, but for rounding."""
    spec = spec_from_config(entry.config, quant=entry.default_quant, name=entry.name)
    assert spec.num_parameters == pytest.approx(entry.published_parameters, rel=ROUNDING)
    if entry.published_active_parameters is not None:
        # Publishers differ in whether embeddings and norms count as active.
        assert spec.num_experts > spec.num_active_experts > 0
        assert 0.7 < spec.active_parameters / entry.published_active_parameters < 1.5


@every_entry
def test_every_published_quant_can_be_planned(entry: CatalogueEntry) -> None:
    """Each quant of a model has a recipe, and what it costs in quality counts for ranking."""
    sizes = []
    for quant in (*entry.gguf_quants, *entry.mlx):
        spec = spec_from_config(entry.config, quant=quant, name=entry.name)
        assert 0 < spec.active_bytes <= spec.weights_bytes
        assert perplexity_increase_percent(quant) is not None
        if quant in entry.gguf_quants:
            sizes.append(spec.weights_bytes)
    assert sizes == sorted(sizes)
    assert entry.context_tokens <= spec.trained_context_tokens


@pytest.mark.parametrize(("form", "num_bytes"), HUB_BYTES.items(), ids=lambda form: str(form))
def test_mlx_bytes_are_the_hub_s(form: tuple[str, str], num_bytes: int) -> None:
    """Weights by config and quant take what the hub's files take, to 0.1 %."""
    entry, _ = find(form[0])
    spec = spec_from_config(entry.config, quant=form[1], name=entry.name)
    assert spec.weights_bytes == pytest.approx(num_bytes, rel=0.001)


@every_entry
def test_an_entry_says_what_it_is_and_where_from(entry: CatalogueEntry) -> None:
    """Release month, uses, repositories and sources are there and well-formed."""
    assert re.fullmatch(r"20\d\d-(0[1-9]|1[0-2])", entry.released)
    assert entry.uses
    assert set(entry.uses) <= {"chat", "code", "long", "embed"}
    assert set(entry.sources) == {"config", "parameters", "released", "pull"}
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+", repo) for repo in (entry.gguf, *entry.mlx.values()))
    assert entry.gguf_quants


def test_names_mean_one_model_each() -> None:
    """No name or alias stands for two models."""
    names = [name.lower() for entry in entries() for name in (entry.name, *entry.aliases)]
    assert len(names) == len(set(names))


def test_the_catalogue_spans_sizes_and_uses() -> None:
    """From half a billion parameters to the largest under 700 billion, for every use."""
    sizes = [entry.published_parameters for entry in entries() if "embed" not in entry.uses]
    assert len(sizes) >= 40
    assert min(sizes) <= 0.5e9
    assert 600e9 < max(sizes) < 700e9
    assert {use for entry in entries() for use in entry.uses} == {"chat", "code", "long", "embed"}


@pytest.mark.parametrize(
    ("name", "found", "quant"),
    [
        ("Qwen3-8B", "Qwen3-8B", "Q4_K_M"),
        ("qwen3:8b", "Qwen3-8B", "Q4_K_M"),
        ("QWEN3_8b", "Qwen3-8B", "Q4_K_M"),
        ("Qwen3-8B:Q6_K", "Qwen3-8B", "Q6_K"),
        ("qwen3:8b-q8_0", "Qwen3-8B", "Q8_0"),
        ("Qwen3-8B-MLX-4bit", "Qwen3-8B", "MLX 4bit"),
        ("Qwen3-8B-4bit", "Qwen3-8B", "MLX 4bit"),
        ("Qwen3-4B-Instruct-2507-Q4_K_M", "Qwen3-4B-Instruct-2507", "Q4_K_M"),
        ("gpt-oss:20b", "gpt-oss-20b", "MXFP4"),
        ("qwen3-coder:30b", "Qwen3-Coder-30B-A3B-Instruct", "Q6_K"),
        ("bge-m3", "bge-m3", "F16"),
    ],
)
def test_names_are_found_however_written(name: str, found: str, quant: str) -> None:
    """Hub names and ollama's, with and without a quant, mean the same model."""
    entry, meant = find(name)
    assert (entry.name, meant) == (found, quant)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("qwen3", "did you mean Qwen3-0.6B or"),
        ("lama3.3", "Llama-3.3-70B-Instruct"),
        ("Qwen3-8B-Q5_K_S", "not in the catalogue as q5-k-s: it has Q3_K_M, Q4_K_M"),
        ("?!", "no model of the catalogue is named '?!'; see: brim recommend"),
        ("", "see: brim recommend"),
    ],
)
def test_an_unknown_name_gets_the_nearest(name: str, words: str) -> None:
    """A name that nothing has is answered with those that come near."""
    with pytest.raises(NotFound, match=re.escape(words)):
        find(name)


def test_fewer_bits_never_cost_less_among_k_quants() -> None:
    """Published losses of K-quants fall as bits rise, as far as brim offers them."""
    ladder = ["Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0"]
    qualities = [quant_quality(quant) for quant in ladder]
    bits = [each.bits_per_weight for each in qualities if each]
    divergences = [each.mean_kld for each in qualities if each and each.mean_kld is not None]
    assert bits == sorted(bits)
    assert len(divergences) == len(ladder)
    assert divergences == sorted(divergences, reverse=True)


def test_costs_are_told_as_published() -> None:
    """A quant's cost is its published figure with the model, none, or not published."""
    assert quality_cost("Q4_K_M") == "KLD 0.0313, perplexity +2.8 % (Llama 3 8B)"
    assert quality_cost("MXFP4").startswith("none")
    assert quality_cost("MLX 3bit") == quality_cost("TQ1_0") == "not published"
    assert perplexity_increase_percent("TQ1_0") is None
    assert perplexity_increase_percent("MXFP4") == 0.0
