"""The models that brim knows by name, and what each quant is known to cost in quality.

Owns `data/catalogue.json` and `data/quant_quality.json`: figures from publishers and from public
measurements, each with its source; docs/catalogue.md says how they were checked.  What a model
takes here follows from its config (`config_json`); which one to choose is the planner's to say.
"""

import difflib
import functools
import importlib.resources
import re
from collections.abc import Iterable
from typing import Any

import msgspec

from brim.core.model import ModelSpec
from brim.errors import InvalidRequest, NotFound
from brim.registry.config_json import spec_from_config
from brim.registry.quants import parse_quant

DEFAULT_QUANTS = {"chat": "Q4_K_M", "long": "Q4_K_M", "code": "Q6_K", "embed": "F16"}
"""Where nobody asks for another: half a model's worth of bits is the field's usual choice for chat,
code shows errors sooner, and an embedder is small enough to be left whole."""

FALLBACK_QUANTS = ("Q4_K_M", "Q8_0", "MXFP4", "F16")
"""For models that are not published in their use's default."""

MAX_NEAREST = 6
"""Names in an error message; a longer list is not read."""


class CatalogueEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model as its publisher describes it."""

    name: str
    """Its name on the hub, without the publisher."""
    aliases: tuple[str, ...] = ()
    """Other names it is known by, as in 'qwen3:8b'."""
    publisher: str
    license: str
    """As the hub spells it: 'apache-2.0', 'mit', 'llama3.3', ..."""
    released: str
    """Year and month: '2025-04'."""
    uses: tuple[str, ...]
    """Of 'chat', 'code', 'long' and 'embed'; the first is what it is made for."""
    published_parameters: int
    """Of the text model, as rounded by the source; the exact count follows from `config`."""
    published_active_parameters: int | None = None
    """Those that one token uses, for a mixture of experts."""
    context_tokens: int
    """What it was trained for."""
    gguf: str
    """Hub repository with GGUF files."""
    gguf_quants: tuple[str, ...]
    """Quants of that repository that brim plans for, smallest first."""
    gguf_names: dict[str, str] = {}
    """What that repository's files call a quant, where it is another name."""
    mlx: dict[str, str] = {}
    """Hub repositories in MLX form by quant ('MLX 4bit')."""
    sources: dict[str, str]
    """Where config, parameters, release month and pull names come from."""
    note: str = ""
    config: dict[str, Any]
    """The keys of its config.json that bytes and speed depend on."""

    @property
    def default_quant(self) -> str:
        """The GGUF quant that is meant where none is named."""
        wanted = (DEFAULT_QUANTS[self.uses[0]], *FALLBACK_QUANTS)
        return next((q for q in wanted if q in self.gguf_quants), self.gguf_quants[-1])

    @property
    def default_mlx_quant(self) -> str | None:
        """The MLX quant that is meant where none is named; None where it would lose more.

        The smallest with as many bits as the GGUF default's name says.

        Example:
            >>> find("qwen3:8b")[0].default_mlx_quant
            'MLX 4bit'
            >>> find("Qwen3-Coder-30B-A3B-Instruct")[0].default_mlx_quant is None
            True
        """
        least = _bits(self.default_quant)
        return min((q for q in self.mlx if _bits(q) >= least), key=_bits, default=None)

    def spec(self, quant: str, name: str) -> ModelSpec:
        """The model as large as a quant's recipe makes it, under the name that clients will use.

        Raises:
            InvalidRequest: No quant is called so.
        """
        spec = spec_from_config(self.config, quant=quant, name=name)
        # Some configs leave room for more positions than the model was trained on.
        context_tokens = min(self.context_tokens, spec.trained_context_tokens)
        return msgspec.structs.replace(spec, trained_context_tokens=context_tokens)

    def pull_name(self, quant: str) -> str:
        """Where the hub has it in one of its quants; GGUF ones are what `brim serve -m` takes.

        Example:
            >>> find("qwen3:8b")[0].pull_name("Q6_K")
            'hf:bartowski/Qwen_Qwen3-8B-GGUF:Q6_K'
        """
        if quant in self.mlx:
            return f"hf:{self.mlx[quant]}"
        return f"hf:{self.gguf}:{self.gguf_names.get(quant, quant)}"


class QuantQuality(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is published about one quant; None where nobody measured."""

    quant: str
    bits_per_weight: float
    mean_kld: float | None = None
    """Kullback-Leibler divergence from the 16-bit model, nats a token, Llama 3 8B."""
    perplexity_increase_percent: float | None = None
    """On the same model and text."""
    has_imatrix: bool = False
    """Whether the measured file was made with an importance matrix."""
    mmlu_pro: dict[str, float] = {}
    """Percent right by model."""
    ranked_as: str | None = None
    """The measured quant that it counts as where its own divergence is not published."""
    is_as_trained: bool = False
    """The model was trained in this type: nothing is lost."""
    note: str = ""


class _Catalogue(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    as_of: str
    models: tuple[CatalogueEntry, ...]


class _Qualities(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    sources: dict[str, str]
    mmlu_pro_bf16: dict[str, float]
    quants: tuple[QuantQuality, ...]


def _data(name: str) -> bytes:
    return (importlib.resources.files("brim.registry") / "data" / name).read_bytes()


@functools.cache
def entries() -> tuple[CatalogueEntry, ...]:
    """Every model of the catalogue, by family."""
    return msgspec.json.decode(_data("catalogue.json"), type=_Catalogue).models


@functools.cache
def _qualities() -> _Qualities:
    return msgspec.json.decode(_data("quant_quality.json"), type=_Qualities)


def quant_quality(quant: str) -> QuantQuality | None:
    """What is published about a quant; None for one that nobody measured.

    Example:
        >>> quant_quality("Q4_K_M").mean_kld
        0.031273
    """
    return next((each for each in _qualities().quants if each.quant == quant), None)


def perplexity_increase_percent(quant: str) -> float | None:
    """What a quant counts as for ranking: its own figure, or that of the quant it is ranked as.

    Example:
        >>> perplexity_increase_percent("MLX 4bit") == perplexity_increase_percent("Q4_0")
        True
    """
    quality = quant_quality(quant)
    if quality is None:
        return None
    if quality.is_as_trained:
        return 0.0
    if quality.ranked_as is not None:
        return perplexity_increase_percent(quality.ranked_as)
    return quality.perplexity_increase_percent


def quality_cost(quant: str) -> str:
    """What a quant costs in quality, in the published figures' own terms.

    Example:
        >>> quality_cost("Q6_K")
        'KLD 0.0055, perplexity +0.3 % (Llama 3 8B)'
        >>> quality_cost("MLX 4bit")
        'MMLU-Pro 64.05 -> 60.72 (Qwen3-4B-Instruct-2507)'
    """
    quality = quant_quality(quant)
    if quality is None:
        return "not published"
    if quality.is_as_trained:
        return "none: the model was trained in it"
    if quality.mean_kld is not None and quality.perplexity_increase_percent is not None:
        return (
            f"KLD {quality.mean_kld:.4f}, perplexity +{quality.perplexity_increase_percent:.1f} % "
            "(Llama 3 8B)"
        )
    for model, score in quality.mmlu_pro.items():
        return f"MMLU-Pro {_qualities().mmlu_pro_bf16[model]:g} -> {score:g} ({model})"
    return "not published"


def find(name: str, quant: str | None = None) -> tuple[CatalogueEntry, str]:
    """The model that a name means, and its quant: the one asked for, or the model's default.

    Args:
        name: 'Qwen3-8B', 'qwen3:8b', each also with a quant behind it: 'Qwen3-8B:Q6_K',
            'qwen3:8b-q8_0', 'Qwen3-8B-MLX-4bit'.  Case, '_' and spaces do not matter.
        quant: One asked for beside the name, published or not.

    Raises:
        NotFound: No model has that name, or not in that quant; the message gives the nearest.
        InvalidRequest: The name has another quant behind it than `quant`, which may be unknown.

    Example:
        >>> entry, quant = find("qwen3:8b")
        >>> entry.name, quant
        ('Qwen3-8B', 'Q4_K_M')
        >>> find("Qwen3-8B-Q6_K")[1]
        'Q6_K'
    """
    entry, named = _find(name)
    if quant is None:
        return entry, named
    # A default that was named looks like one that was not, and gives way like that.
    if parse_quant(quant) != parse_quant(named) and named != entry.default_quant:
        raise InvalidRequest(f"{name:.100} names a quant already; leave {quant:.40} out")
    return entry, quant


def _find(name: str) -> tuple[CatalogueEntry, str]:
    asked = _plain(name)
    known = _names()
    if asked in known:
        return known[asked], known[asked].default_quant
    for stem, entry in known.items():
        if asked.startswith(f"{stem}-"):
            rest = asked.removeprefix(f"{stem}-")
            for quant in (*entry.gguf_quants, *entry.mlx):
                if rest in (_plain(quant), _plain(quant).removeprefix("mlx-")):
                    return entry, quant
            if _is_quant(rest):
                published = ", ".join((*entry.gguf_quants, *entry.mlx))
                raise NotFound(
                    f"{entry.name} is not in the catalogue as {rest}: it has {published}"
                )
    nearest = _nearest(asked, known)
    hint = f"did you mean {' or '.join(nearest)}?" if nearest else "see: brim recommend"
    raise NotFound(f"no model of the catalogue is named '{name:.100}'; {hint}")


@functools.cache
def _names() -> dict[str, CatalogueEntry]:
    """Every model by each of its names, written plainly."""
    return {_plain(n): entry for entry in entries() for n in (entry.name, *entry.aliases)}


def _plain(name: str) -> str:
    """A name without what people write differently.

    Example:
        >>> _plain("Qwen3:8b Q4_K_M")
        'qwen3-8b-q4-k-m'
    """
    return re.sub(r"[\s:_/-]+", "-", name.strip().lower()).strip("-")


def is_model_name(name: str) -> bool:
    """Whether it is a model's name with no quant behind it.

    Example:
        >>> is_model_name("qwen3:8b"), is_model_name("qwen3:8b-q8_0"), is_model_name("?")
        (True, False, False)
    """
    return _plain(name) in _names()


def _bits(quant: str) -> int:
    """The bits of a weight by a quant's name, without scales.

    Example:
        >>> _bits("Q4_K_M"), _bits("MLX 6bit"), _bits("MXFP4"), _bits("BF16")
        (4, 6, 4, 16)
    """
    return int(re.findall(r"\d+", quant)[0])


def _is_quant(text: str) -> bool:
    return re.fullmatch(r"(ud-)?i?q\d.*|b?f16|f32|mxfp4|fp8|(mlx-)?\d-?bit", text) is not None


def _nearest(asked: str, known: Iterable[str]) -> list[str]:
    """Names that begin alike, then those that look alike; one for each model."""
    names = list(known)
    alike = [name for name in names if name.startswith(asked)] if asked else []
    alike += difflib.get_close_matches(asked, names, n=MAX_NEAREST, cutoff=0.5)
    return list(dict.fromkeys(_names()[name].name for name in alike))[:MAX_NEAREST]
