"""One app that may use the server: what its manifest grants, without its key."""

from enum import StrEnum

import msgspec

from brim.core.request import OverflowPolicy, Priority


class KvQuality(StrEnum):
    """How exactly keys and values are kept: the least that an app is content with."""

    F32 = "f32"
    F16 = "f16"
    """bf16 is as good: whichever of the two the model was made for."""
    Q8_0 = "q8_0"
    Q5_1 = "q5_1"
    Q5_0 = "q5_0"
    Q4_1 = "q4_1"
    Q4_0 = "q4_0"

    def is_met_by(self, kv_type: str) -> bool:
        """Whether a KV type is at least as exact; one that is not known here is not.

        Example:
            >>> KvQuality.F16.is_met_by("bf16"), KvQuality.Q8_0.is_met_by("q4_0")
            (True, False)
        """
        equal = {"bf16": "f16", "iq4_nl": "q4_0"}.get(kv_type, kv_type)
        ranks = {quality.value: rank for rank, quality in enumerate(KvQuality)}
        return equal in ranks and ranks[equal] <= ranks[self.value]


class Pair(msgspec.Struct, frozen=True, kw_only=True):
    """A model and the small one that drafts for it, or answers in its place to save power."""

    target: str
    draft: str


class Budgets(msgspec.Struct, frozen=True, kw_only=True):
    """What an app may use in one day, in UTC; None is no bound."""

    tokens: int | None = None
    """Read and written."""
    energy_j: float | None = None
    """Where the machine can tell."""
    ssd_write_bytes: int | None = None
    """Of the prefix cache.  Beyond it, prompts are kept in memory alone; nothing is refused."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What an app may do at once; None is no bound."""

    requests_per_minute: int | None = None
    max_concurrent: int | None = None
    memory_share: float = 1.0
    """Of each model's KV pool, that its requests may hold together."""


class App(msgspec.Struct, frozen=True, kw_only=True):
    """An app as the server knows it."""

    name: str
    priority: Priority = Priority.INTERACTIVE
    """The best that its requests may ask for."""
    models: tuple[str, ...] = ()
    """That it may use, both of each pair included; empty for all."""
    pairs: tuple[Pair, ...] = ()
    """Of these models, those that belong together."""
    overflow: OverflowPolicy | None = None
    """Where a request does not say; None leaves it to the server."""
    max_context_tokens: int | None = None
    """Longest prompt plus answer, where the model's window is longer."""
    kv_quality: KvQuality | None = None
    """The least that it accepts of the models' KV type; None accepts any."""
    required_bytes: int | None = None
    """Of memory for its models, as its author says; told where the machine has less."""
    accepts_draft: bool = False
    """Whether the smaller model of a pair may answer where power is short."""
    keep_loaded: bool = False
    """Whether its models are pinned while it is known."""
    budgets: Budgets = Budgets()
    limits: Limits = Limits()

    def may_use(self, model: str) -> bool:
        """Whether a model was granted to it."""
        return not self.models or model in self.models

    def accepts_draft_of(self, pair: tuple[str, str] | None) -> bool:
        """Whether the small one of two models, target and draft, may answer for the other.

        Example:
            >>> mail = App(name="mail", pairs=(Pair(target="a", draft="b"),), accepts_draft=True)
            >>> mail.accepts_draft_of(("a", "b")), mail.accepts_draft_of(("a", "c"))
            (True, False)
        """
        return self.accepts_draft and pair in {(each.target, each.draft) for each in self.pairs}

    def accepts_kv(self, kv_type_k: str, kv_type_v: str) -> bool:
        """Whether a model with these KV types is exact enough for it."""
        quality = self.kv_quality
        return quality is None or (quality.is_met_by(kv_type_k) and quality.is_met_by(kv_type_v))
