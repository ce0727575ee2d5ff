"""Every setting with its meaning, range and default; docs/settings.md is made from here."""

from typing import Annotated

import msgspec
from msgspec import Meta

from brim.core.plan import Objective
from brim.core.request import OverflowPolicy

MAX_SETTING_S = 86_400
"""A day: longer waits are mistakes, and infinity cannot be written as JSON."""

# Each pattern has an example, which errors show in place of the pattern.
HostName = Annotated[str, Meta(pattern=r"^([^\s/@:]+|[0-9a-fA-F:.]+)$", examples=["studio.local"])]
"""Without scheme and port."""

Origin = Annotated[
    str, Meta(pattern=r"^[a-z][a-z0-9+.-]*://[^\s/]+$", examples=["https://app.example"])
]
"""As browsers send it: scheme, host, and the port where it is not the scheme's own."""

PairOfNames = Annotated[str, Meta(pattern=r"^[^+\s]+\+[^+\s]+$", examples=["chat+draft"])]
"""Two names as models are served under, the larger model first."""

NamedNumber = Annotated[str, Meta(pattern=r"^[^=\s]+=[1-9][0-9]{0,2}$", examples=["chat=4"])]


class ServerSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The HTTP server."""

    host: Annotated[
        str, Meta(min_length=1, description="Address to listen on; 0.0.0.0 means every interface.")
    ] = "127.0.0.1"
    port: Annotated[
        int, Meta(ge=0, le=65535, description="TCP port; 0 lets the system pick a free one.")
    ] = 2746
    drain_limit_s: Annotated[
        float,
        Meta(
            ge=0,
            le=MAX_SETTING_S,
            description="Seconds that running answers get to finish when the server stops.",
        ),
    ] = 30.0
    max_body_bytes: Annotated[
        int,
        Meta(
            ge=1024,
            # Below the worker protocol's largest frame of 64 MiB, with room for the encoding.
            le=48 * 1024 * 1024,
            description="Largest request body; a larger one is answered with 413.",
        ),
    ] = 32 * 1024 * 1024
    """Millions of tokens of text, more than any window."""
    require_keys: Annotated[
        bool,
        Meta(
            description="Whether every request needs the key of an app; on an address that other "
            "machines reach it always does."
        ),
    ] = False
    state_directory: Annotated[
        str,
        Meta(
            description="Where apps, usage and events are kept; the platform's directory where "
            "empty.  One server at a time."
        ),
    ] = ""
    allowed_hosts: Annotated[
        tuple[HostName, ...],
        Meta(
            description="Names that clients may call the server by, besides those of this "
            "machine's loopback; with any, a server on another address refuses all others."
        ),
    ] = ()
    allowed_origins: Annotated[
        tuple[Origin, ...],
        Meta(description="Origins whose web pages may use the server, as `https://app.example`."),
    ] = ()


class ModelSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How models are loaded and shared."""

    context_tokens: Annotated[
        int,
        Meta(
            ge=256,
            description="Longest prompt plus answer of one sequence; a model trained on less "
            "gets what it was trained on.",
        ),
    ] = 8192
    max_sequences: Annotated[
        int,
        Meta(
            ge=1,
            le=256,
            description="Most sequences that one model works on at once; llama.cpp takes 256.",
        ),
    ] = 16
    answer_tokens: Annotated[
        int,
        Meta(ge=1, description="Bound of an answer whose request gives no max_tokens."),
    ] = 2048
    max_queued_requests: Annotated[
        int,
        Meta(
            ge=0,
            description="Most requests that wait for one model; more are answered with 503.  "
            "Background requests take no place of interactive ones.",
        ),
    ] = 64
    objective: Annotated[
        Objective,
        Meta(description="What a plan favours where one thing costs another."),
    ] = Objective.DECODE
    overflow: Annotated[
        OverflowPolicy,
        Meta(
            description="What becomes of a conversation that outgrows the window where the "
            "request does not say: reject, trim (drop the oldest turns), shift (drop the oldest "
            "tokens), summarize."
        ),
    ] = OverflowPolicy.REJECT
    stall_target_s: Annotated[
        float,
        Meta(
            ge=0.02,
            le=60,
            description="Longest pause of a running answer, in seconds, while another prompt is "
            "read: prompts are read in pieces of about this long.",
        ),
    ] = 0.3
    keep_loaded: Annotated[
        tuple[str, ...],
        Meta(
            description="Names of models that stay in memory when idle; only pressure unloads them."
        ),
    ] = ()
    pairs: Annotated[
        tuple[PairOfNames, ...],
        Meta(
            description="Pairs as `TARGET+DRAFT`, by the names that they are served under: loaded, "
            "kept and unloaded together; the draft may answer for the target where power is short."
        ),
    ] = ()
    parallel: Annotated[
        tuple[NamedNumber, ...],
        Meta(description="Sequences of single models as `NAME=N`, in place of `max_sequences`."),
    ] = ()
    load_wait_s: Annotated[
        float,
        Meta(
            ge=0,
            le=MAX_SETTING_S,
            description="Longest that a request waits for its model to be loaded, in seconds, the "
            "answers of others that hold its memory included; then it is told to come again.",
        ),
    ] = 300.0
    exact_profile: Annotated[
        bool,
        Meta(
            description="Whether results must not depend, to the bit, on what else a step holds or "
            "what was reused: slower, and for quantised models on a processor."
        ),
    ] = False
    allow_force: Annotated[
        bool,
        Meta(
            description='Whether a request may say `"brim": {"force": true}`: load its model and '
            "run although memory that they may need is not free."
        ),
    ] = False


class WorkerSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The model processes."""

    restart_backoff_s: Annotated[
        float,
        Meta(
            ge=0,
            le=MAX_SETTING_S,
            description="Seconds before a worker that died is started again; doubles with each "
            "death in a row.",
        ),
    ] = 0.5
    restart_backoff_limit_s: Annotated[
        float,
        Meta(ge=0, le=MAX_SETTING_S, description="Longest wait before a restart, in seconds."),
    ] = 30.0
    deaths_before_quarantine: Annotated[
        int,
        Meta(
            ge=1,
            description="Deaths in a row after which a model is left alone for minutes; then a "
            "request tries it again.",
        ),
    ] = 3


GIB = 1024**3


class CacheSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Prefixes of prompts whose KV is kept on disk, so that they are not computed again."""

    enabled: Annotated[
        bool,
        Meta(description="Whether KV of prompts is kept on disk; in memory it is reused anyway."),
    ] = True
    directory: Annotated[
        str, Meta(description="Where; brim's own cache directory where empty.")
    ] = ""
    budget_bytes: Annotated[
        int, Meta(ge=0, description="Most bytes of all entries of all models; 0 keeps none.")
    ] = 16 * GIB
    daily_write_bytes: Annotated[
        int, Meta(ge=0, description="Most bytes written in a day, for the SSD's sake.")
    ] = 64 * GIB
    free_disk_floor_bytes: Annotated[
        int,
        Meta(ge=0, description="Bytes that stay free on the disk; entries are removed before."),
    ] = 10 * GIB
    max_inflight_bytes: Annotated[
        int,
        Meta(
            ge=0, description="Most bytes on their way to the disk, which memory holds meanwhile."
        ),
    ] = GIB // 4
    min_tokens: Annotated[
        int, Meta(ge=1, description="Shortest prefix that is kept on disk, in tokens.")
    ] = 128


class GovernorSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What gives memory and power back when the system says that they are short."""

    enabled: Annotated[
        bool,
        Meta(description="Whether pressure, heat, power and idleness are answered at all."),
    ] = True
    idle_unload_s: Annotated[
        float,
        Meta(
            ge=0,
            le=MAX_SETTING_S,
            description="Idle seconds after which a model leaves memory; 0 lets it stay.",
        ),
    ] = 180.0
    low_battery_percent: Annotated[
        int,
        Meta(ge=0, le=100, description="Battery at or below which work slows down."),
    ] = 20


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole tree; immutable, passed down by value."""

    server: ServerSettings = ServerSettings()
    models: ModelSettings = ModelSettings()
    worker: WorkerSettings = WorkerSettings()
    cache: CacheSettings = CacheSettings()
    governor: GovernorSettings = GovernorSettings()
