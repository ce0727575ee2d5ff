"""Reads what an app's author wrote down as TOML: what it needs, and what it is content with.

    name = "mail-summary"
    priority = "background"             # nobody waits for it
    models = ["qwen3-4b", { target = "qwen3-14b", draft = "qwen3-0.6b" }]

    [budgets]
    tokens_per_day = 200_000

    [limits]
    max_concurrent = 2

How models are loaded is the runtime's business: keys for that are refused with the reason.
docs/apps.md lists every key; `document` makes its table from the structs below.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from brim.config import toml_file
from brim.core.app import App, Budgets, KvQuality, Limits, Pair
from brim.core.request import OverflowPolicy, Priority
from brim.errors import ConfigError

MAX_MANIFEST_BYTES = 64 * 1024
"""A long one has one."""

MAX_MODELS = 64
"""A machine serves a handful."""

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
"""Fit for a file's name, a URL and a cache's namespace alike."""

ModelName = Annotated[str, Meta(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f\x7f]+\Z")]
"""As `/v1/models` gives it."""


class PairTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model and the small one that drafts for it."""

    target: ModelName
    draft: ModelName


class RequiresTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the app cannot do without."""

    memory_gb: Annotated[
        Annotated[float, Meta(gt=0, le=4096)] | None,
        Meta(
            description="Memory for its models, in 10^9 bytes; `brim apps add` warns where this "
            "machine has less to give."
        ),
    ] = None


class ContextTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long its conversations are."""

    max_tokens: Annotated[
        Annotated[int, Meta(ge=16, le=2**31 - 1)] | None,
        Meta(description="Longest prompt plus answer, where the model's window is longer."),
    ] = None
    overflow: Annotated[
        OverflowPolicy | None,
        Meta(
            description="What becomes of a conversation that outgrows it, where a request does "
            "not say."
        ),
    ] = None


class BudgetsTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What it may use in one day, which begins at 00:00 UTC; no bound where a key is left out."""

    tokens_per_day: Annotated[
        Annotated[int, Meta(ge=1, le=10**12)] | None,
        Meta(description="Tokens read and written; beyond, requests get 429 until it renews."),
    ] = None
    energy_wh_per_day: Annotated[
        Annotated[float, Meta(gt=0, le=10**6)] | None,
        Meta(
            description="Watt-hours of the machine that its requests took, where the machine can "
            "tell; beyond, requests get 429."
        ),
    ] = None
    ssd_write_gb_per_day: Annotated[
        Annotated[float, Meta(ge=0, le=10**6)] | None,
        Meta(
            description="10^9 bytes of its prompts that are kept on disk; beyond, they are kept "
            "in memory alone and nothing is refused. 0 keeps none on disk."
        ),
    ] = None


class LimitsTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What it may do at once; no bound where a key is left out."""

    requests_per_minute: Annotated[
        Annotated[int, Meta(ge=1, le=100_000)] | None,
        Meta(description="Requests in any 60 seconds; beyond, 429."),
    ] = None
    max_concurrent: Annotated[
        Annotated[int, Meta(ge=1, le=10_000)] | None,
        Meta(description="Requests in work at once, those that wait included; beyond, 429."),
    ] = None
    memory_share: Annotated[
        Annotated[float, Meta(gt=0, le=1)],
        Meta(
            description="Part of each model's KV pool that its running requests may hold "
            "together; beyond, 429."
        ),
    ] = 1.0


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file."""

    name: Annotated[
        str,
        Meta(description="Lower-case letters, digits, `-` and `_`, 64 at most; unique."),
    ]
    priority: Annotated[
        Priority,
        Meta(
            description="The best that its requests get: `interactive` where someone waits for "
            "the answer; `background` goes after those and pauses where power or memory is short."
        ),
    ] = Priority.INTERACTIVE
    models: Annotated[
        Annotated[tuple[ModelName | PairTable, ...], Meta(min_length=1, max_length=MAX_MODELS)]
        | None,
        Meta(
            description="Models that it may use, by the names that the server gives them; a pair "
            "is `{ target = ..., draft = ... }`. All models where left out."
        ),
    ] = None
    kv_quality: Annotated[
        KvQuality | None,
        Meta(
            description="The least exact KV cache that it accepts; a model that keeps its KV less "
            "exactly is refused to it."
        ),
    ] = None
    keep_loaded: Annotated[
        bool,
        Meta(
            description="Whether its models stay in memory when idle, as long as memory is not "
            "short; needs `models`."
        ),
    ] = False
    accepts_draft: Annotated[
        bool,
        Meta(
            description="Whether the small model of a pair may answer where power is short; the "
            "answer says so."
        ),
    ] = False
    requires: RequiresTable = RequiresTable()
    context: ContextTable = ContextTable()
    budgets: BudgetsTable = BudgetsTable()
    limits: LimitsTable = LimitsTable()


_THREADS = (
    "the runtime measures how many threads a step is worth, and gives way to other programs: more "
    "of them made a token take 1,650 ms instead of 43 beside one busy program"
)
_MAPPING = (
    "weights are mapped wherever the engine can, so that the system may take their pages back and "
    "read them again; a copy could only be swapped"
)
_WIRING = (
    "memory that the system cannot take back is what freezes and panics machines with one memory; "
    "keep_loaded keeps a model without locking it"
)
_PLANNED = "the plan decides how a model is loaded, by what was measured on this machine"

_FORBIDDEN = {
    **dict.fromkeys(
        ("threads", "num_threads", "n_threads", "thread_count", "num_batch_threads",
         "threads_batch", "n_threads_batch", "cpu_threads", "cores", "num_cores"),
        _THREADS,
    ),
    **dict.fromkeys(
        ("cpu_affinity", "affinity", "cpu_mask", "cpu_range", "cpu_strict", "cpuset", "taskset",
         "numa", "nice", "qos", "poll"),
        "where and when work runs is decided for all apps together; priority says how urgent it is",
    ),
    **dict.fromkeys(("mmap", "no_mmap", "use_mmap", "nommap"), _MAPPING),
    **dict.fromkeys(
        ("mlock", "use_mlock", "mem_lock", "wired_limit", "wired_limit_mb", "wired_bytes",
         "wire_weights", "set_wired_limit", "iogpu", "iogpu_wired_limit_mb"),
        _WIRING,
    ),
    **dict.fromkeys(
        ("gpu_layers", "n_gpu_layers", "ngl", "batch_size", "n_batch", "ubatch_size", "n_ubatch",
         "flash_attention", "flash_attn", "cache_type_k", "cache_type_v", "kv_type", "kv_type_k",
         "kv_type_v", "memory_limit", "cache_limit", "repack", "no_repack"),
        _PLANNED,
    ),
}  # fmt: skip
"""Key -> why an app may not set it."""


def load_manifest(path: Path) -> tuple[App, str]:
    """The app that a file describes, and the file's text.

    Raises:
        ConfigError: The file cannot be read, or a key or value of it is wrong.
    """
    text = toml_file.read_text(path, what="the manifest", max_bytes=MAX_MANIFEST_BYTES)
    return parse_manifest(text, where=str(path)), text


def parse_manifest(text: str, *, where: str) -> App:
    """The app that a manifest describes.

    Args:
        text: TOML.
        where: The file, for messages.

    Raises:
        ConfigError: A key or value is wrong; the message names it.

    Example:
        >>> parse_manifest('name = "mail"', where="mail.toml").may_use("any model")
        True
    """
    if len(text.encode("utf-8", "surrogatepass")) > MAX_MANIFEST_BYTES:
        raise ConfigError(f"{where} is over {MAX_MANIFEST_BYTES} bytes, so it is no manifest")
    document = toml_file.parse_document(text, where=where)
    for place, key in _keys(document):
        if reason := _FORBIDDEN.get(key.lower().replace("-", "_")):
            raise ConfigError(f"{where}:{place} an app cannot set {key!r}: {reason}", param=key)
    toml_file.check_keys(document, Manifest, where=where)
    manifest = toml_file.convert(document, Manifest, where=where)
    return _app(manifest, where)


def _keys(table: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(place for a message, key) of every key, as deep as a manifest goes."""
    for key, value in table.items():
        yield "", key
        entries = value if isinstance(value, list) else [value]
        for entry in entries:
            for inner in entry if isinstance(entry, dict) else ():
                yield f" [{key}]", inner


def _app(manifest: Manifest, where: str) -> App:
    if not is_name(manifest.name):
        raise ConfigError(
            f"{where}: name cannot be {manifest.name[:100]!r}: take lower-case letters, digits, "
            "'-' and '_', a letter or a digit first, 64 at most",
            param="name",
        )
    models, pairs = _models(manifest, where)
    if manifest.keep_loaded and not models:
        raise ConfigError(f"{where}: keep_loaded needs models: which ones should stay in memory?")
    if manifest.accepts_draft and not pairs:
        raise ConfigError(
            f"{where}: accepts_draft needs a pair among the models: "
            "models = [{ target = '...', draft = '...' }]"
        )
    budgets, limits = manifest.budgets, manifest.limits
    return App(
        name=manifest.name,
        priority=manifest.priority,
        models=models,
        pairs=pairs,
        overflow=manifest.context.overflow,
        max_context_tokens=manifest.context.max_tokens,
        kv_quality=manifest.kv_quality,
        required_bytes=_scaled(manifest.requires.memory_gb, 10**9),
        accepts_draft=manifest.accepts_draft,
        keep_loaded=manifest.keep_loaded,
        budgets=Budgets(
            tokens=budgets.tokens_per_day,
            energy_j=None
            if budgets.energy_wh_per_day is None
            else budgets.energy_wh_per_day * 3600,
            ssd_write_bytes=_scaled(budgets.ssd_write_gb_per_day, 10**9),
        ),
        limits=Limits(
            requests_per_minute=limits.requests_per_minute,
            max_concurrent=limits.max_concurrent,
            memory_share=limits.memory_share,
        ),
    )


def _models(manifest: Manifest, where: str) -> tuple[tuple[str, ...], tuple[Pair, ...]]:
    """All names, each once, and the pairs."""
    names: dict[str, None] = {}
    pairs: dict[str, Pair] = {}
    for entry in manifest.models or ():
        if isinstance(entry, str):
            names[entry] = None
            continue
        if entry.target == entry.draft:
            raise ConfigError(f"{where}: models: '{entry.target}' cannot draft for itself")
        if entry.target in pairs:
            raise ConfigError(f"{where}: models: '{entry.target}' has two drafts; keep one")
        names[entry.target] = names[entry.draft] = None
        pairs[entry.target] = Pair(target=entry.target, draft=entry.draft)
    return tuple(names), tuple(pairs.values())


def _scaled(figure: float | None, unit: int) -> int | None:
    return None if figure is None else int(figure * unit)


def is_name(text: str) -> bool:
    """Whether this may be an app's name.

    Example:
        >>> is_name("mail-2"), is_name("../mail")
        (True, False)
    """
    return NAME.fullmatch(text) is not None
