"""Ranks planned models for a machine, and machines for a model: pure, and each place explained.

Nothing here knows how good a model's answers are.  What is known is its size, its age and what its
quant costs, so that is what capability is judged by; docs/catalogue.md has the reasoning.
"""

import functools
import math
from collections.abc import Iterable
from enum import IntEnum, StrEnum

import msgspec

from brim.core.forecast import Forecast, SpeedRange
from brim.core.machine import MachineSpec
from brim.core.plan import Grant, Plan, Verdict
from brim.core.units import gib

INTERACTIVE_TOK_S = 20.0
"""Faster than anybody reads along: silent reading is 238 words a minute (Brysbaert 2019), which is
about 5 tokens a second, and an answer is skimmed at several times that."""

USABLE_TOK_S = 10.0
"""Twice reading speed; below it one waits for the answer and does something else."""

INTERACTIVE_READ_TOK_S = 1_000.0
USABLE_READ_TOK_S = 250.0
"""For embedders, which do not decode: a page of 512 tokens in half a second, and in two.  A search
waits for one passage; a collection of 10,000 takes an hour and a half, or six."""

GENERATION_MONTHS = 7.0
"""Months after which half the parameters do the same.

Xiao et al., "Densing Law of LLMs" (2024), find 3.3 months for the best open models of their day.
A catalogue's models are not each the best of their month, so half that pace is counted.
"""

SIZE_EXPONENT = 0.076
"""How loss falls with parameters: L ~ N^-0.076 (Kaplan et al. 2020, equation 1.1).

It turns a quant's published rise in perplexity into parameters lost.
"""

REFERENCE_LOSS_NATS = math.log(6.2316)
"""Of the model that quants were measured on: Llama 3 8B at F16 on WikiText-2."""

EPOCH_YEAR = 2023
"""From which a model's age is counted; only differences matter."""


class Use(StrEnum):
    """What a model is wanted for."""

    CHAT = "chat"
    CODE = "code"
    LONG = "long"
    EMBED = "embed"


CONTEXT_TOKENS = {Use.CHAT: 8_192, Use.CODE: 32_768, Use.LONG: 65_536, Use.EMBED: 8_192}
"""What each use is planned with, or the model's own context where that is shorter.

Chat is the planner's default; an agent that edits code reads several files before it writes; a long
document is a book's half; a passage to embed is a page, and 8 K is what most embedders take.
"""


class Band(StrEnum):
    """What a decode speed is good for."""

    INTERACTIVE = "interactive"
    USABLE = "usable"
    BATCH = "batch only"


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """One model in one quant, planned for one machine."""

    name: str
    quant: str
    released: str
    """Year and month: '2025-04'."""
    plan: Plan
    grant: Grant
    forecast: Forecast
    perplexity_increase_percent: float | None
    """What the quant is published to cost; None where nobody measured."""

    @property
    def num_parameters(self) -> int:
        """All weights."""
        return self.plan.model.num_parameters

    @property
    def num_active_parameters(self) -> int:
        """Those that one token is multiplied with."""
        return self.plan.model.active_parameters or self.num_parameters


class Recommendation(msgspec.Struct, frozen=True, kw_only=True):
    """One model in the quant that suits the machine best, and its place."""

    candidate: Candidate
    score: float
    """Capability by `capability`."""
    band: Band | None
    """None where speed is not known."""
    band_tok_s: float | None
    """The speed behind the band, by `band_speed`."""
    reason: str
    """One sentence."""
    others: tuple[Candidate, ...] = ()
    """The other quants of the model."""


class MachineFit(msgspec.Struct, frozen=True, kw_only=True):
    """One machine that a model was planned for."""

    machine: MachineSpec
    plan: Plan
    grant: Grant
    forecast: Forecast
    band: Band | None
    """As in `Recommendation`."""


def capability(
    num_parameters: int,
    num_active_parameters: int,
    released: str,
    perplexity_increase_percent: float | None,
) -> float:
    """Doublings of size that a model is worth, whatever it was trained on.

    A mixture of experts counts as the geometric mean of its total and active parameters; seven
    months of age as half the size; a quant as the smaller model whose loss would be as high.

    Args:
        num_parameters: All weights.
        num_active_parameters: Those that one token uses.
        released: Year and month.
        perplexity_increase_percent: Of the quant; None counts as none lost.

    Example:
        >>> dense = capability(8 * 10**9, 8 * 10**9, "2025-04", 0.0)
        >>> capability(16 * 10**9, 16 * 10**9, "2025-04", 0.0) - dense
        1.0
        >>> round(capability(8 * 10**9, 8 * 10**9, "2025-11", 0.0) - dense, 6)
        1.0
    """
    effective = math.sqrt(num_parameters * num_active_parameters)
    year, month = (int(part) for part in released.split("-"))
    months = (year - EPOCH_YEAR) * 12 + month
    return (
        math.log2(effective / 1e9)
        + months / GENERATION_MONTHS
        - lost_doublings(perplexity_increase_percent or 0.0)
    )


def lost_doublings(perplexity_increase_percent: float) -> float:
    """Size that a rise in perplexity is worth, in doublings.

    Example:
        >>> round(lost_doublings(2.816), 2), round(lost_doublings(10.541), 2)
        (0.29, 1.01)
    """
    loss_ratio = 1 + math.log1p(perplexity_increase_percent / 100) / REFERENCE_LOSS_NATS
    return math.log2(loss_ratio) / SIZE_EXPONENT


def lag_doublings(tok_s: float | None, use: Use = Use.CHAT) -> float:
    """What a model lags behind an interactive one, in doublings of size.

    At half the size a model would be twice as fast, because decode reads every active weight for
    each token; so speed short of interactive is worth as much size.

    Example:
        >>> lag_doublings(30.0), lag_doublings(10.0), lag_doublings(None)
        (0.0, 1.0, 0.0)
    """
    bound = INTERACTIVE_READ_TOK_S if use is Use.EMBED else INTERACTIVE_TOK_S
    return 0.0 if tok_s is None else max(0.0, math.log2(bound / max(tok_s, 1e-3)))


def band_of(tok_s: float, use: Use = Use.CHAT) -> Band:
    """What a speed, by `band_speed`, is good for.

    Example:
        >>> band_of(20.0).value, band_of(19.9).value, band_of(9.9).value
        ('interactive', 'usable', 'batch only')
        >>> band_of(20.0, Use.EMBED).value
        'batch only'
    """
    is_read = use is Use.EMBED
    if tok_s >= (INTERACTIVE_READ_TOK_S if is_read else INTERACTIVE_TOK_S):
        return Band.INTERACTIVE
    return Band.USABLE if tok_s >= (USABLE_READ_TOK_S if is_read else USABLE_TOK_S) else Band.BATCH


def recommend(
    candidates: Iterable[Candidate], use: Use, *, default_engine: str | None = None
) -> list[Recommendation]:
    """Each model once, in its best quant, best model first; what does not fit comes last.

    Args:
        candidates: Models in each of their quants, for whichever engine loads that form.
        use: What the model is wanted for.
        default_engine: The machine's own (`engine_choice`), which is taken between forms that are
            worth the same.
    """
    place = functools.partial(_place, use=use, default_engine=default_engine)
    by_model: dict[str, list[Recommendation]] = {}
    for candidate in candidates:
        by_model.setdefault(candidate.name, []).append(_judged(candidate, use))
    best: list[Recommendation] = []
    for judged in by_model.values():
        first, *rest = sorted(judged, key=place)
        others = tuple(each.candidate for each in rest)
        best.append(msgspec.structs.replace(first, others=others))
    return sorted(best, key=place)


def cheapest_first(fits: Iterable[MachineFit]) -> list[MachineFit]:
    """Machines that hold the model: least memory first, then the slowest memory, then cores.

    Memory is what the price of one chip's machines follows, and what decides whether the model
    runs at all; bandwidth tells the smaller chip from the larger.
    """
    held = (fit for fit in fits if fit.grant.verdict is not Verdict.NO)
    return sorted(
        held,
        key=lambda fit: (
            fit.machine.ram_bytes,
            fit.machine.memory_bandwidth or 0,
            fit.machine.gpu_cores or 0,
        ),
    )


def band_speed(forecast: Forecast, use: Use) -> SpeedRange | None:
    """The speed that a use depends on; None where it is not known.

    Decode on a warm machine; for long texts with a full context as well; for embedders, what is
    read.
    """
    if forecast.speed is None:
        return None
    if use is Use.EMBED:
        return forecast.speed.prefill_tok_s
    burst, full = forecast.speed.decode_tok_s, forecast.full_decode_tok_s
    warm = forecast.sustained_decode_tok_s or burst
    if use is not Use.LONG or full is None:
        return warm
    return SpeedRange(
        low=full.low * warm.low / burst.low,
        expected=full.expected * warm.expected / burst.expected,
        high=full.high * warm.high / burst.high,
    )


class _Tier(IntEnum):
    """What counts before capability: that it fits well, and that nobody waits for it."""

    COMFORTABLE = 0
    TIGHT = 1
    SLOW = 2
    NO = 3


def _tier(verdict: Verdict, band: Band | None) -> _Tier:
    if verdict is Verdict.NO:
        return _Tier.NO
    if band is Band.BATCH:
        return _Tier.SLOW
    return _Tier.COMFORTABLE if verdict is Verdict.COMFORTABLE else _Tier.TIGHT


def _place(
    judged: Recommendation, use: Use, default_engine: str | None
) -> tuple[_Tier, float, float, bool, int]:
    """Sorts best first; where nothing fits, what lacks least; ties by engine, then by size."""
    grant = judged.candidate.grant
    short = grant.short_bytes if grant.verdict is Verdict.NO else 0
    worth = judged.score - lag_doublings(judged.band_tok_s, use)
    is_foreign = judged.candidate.plan.engine != default_engine
    tier = _tier(grant.verdict, judged.band)
    return (tier, short, -worth, is_foreign, grant.asked_bytes)


def _judged(candidate: Candidate, use: Use) -> Recommendation:
    speed = band_speed(candidate.forecast, use)
    band = None if speed is None else band_of(speed.expected, use)
    return Recommendation(
        candidate=candidate,
        score=capability(
            candidate.num_parameters,
            candidate.num_active_parameters,
            candidate.released,
            candidate.perplexity_increase_percent,
        ),
        band=band,
        band_tok_s=None if speed is None else speed.expected,
        reason=_reason(candidate, use, speed),
    )


def _reason(candidate: Candidate, use: Use, speed: SpeedRange | None) -> str:
    grant = candidate.grant
    asked, budget = gib(grant.asked_bytes), gib(grant.budget_bytes)
    if grant.verdict is Verdict.NO:
        short = gib(grant.short_bytes)
        return f"needs {asked}, {short} more than {grant.binding} leaves"
    fits = "fits" if grant.verdict is Verdict.COMFORTABLE else "just fits"
    parts = [
        _size(candidate),
        _cost(candidate),
        f"{fits} with {asked} of {budget}",
        _speed(candidate.forecast, use, speed),
    ]
    return "; ".join(parts)


def _size(candidate: Candidate) -> str:
    total, active = candidate.num_parameters / 1e9, candidate.num_active_parameters / 1e9
    if candidate.plan.model.num_experts:
        return f"{total:.3g} B parameters, {active:.2g} B for a token, of {candidate.released}"
    return f"{total:.3g} B parameters of {candidate.released}"


def _cost(candidate: Candidate) -> str:
    percent = candidate.perplexity_increase_percent
    if percent is None:
        return f"nobody published what {candidate.quant} costs"
    if percent < 0.1:
        return f"{candidate.quant} loses {'next to ' if percent else ''}nothing"
    share = 100 * (1 - 2 ** -lost_doublings(percent))
    return f"{candidate.quant} costs as much as {share:.0f} % fewer parameters"


def _speed(forecast: Forecast, use: Use, speed: SpeedRange | None) -> str:
    if speed is None:
        return "its speed on this machine is not known"
    band = band_of(speed.expected, use).value
    if use is Use.EMBED:
        return f"{speed.expected:,.0f} tokens read a second is {band}"
    when = " once warm" if forecast.sustained_decode_tok_s is not None else ""
    if use is Use.LONG and forecast.full_decode_tok_s is not None:
        when += " with a full context"
    return f"{speed.expected:.3g} tok/s{when} is {band}"
