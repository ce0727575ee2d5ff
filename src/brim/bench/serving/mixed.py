"""Recorded requests: at rising rates, as they come in from many people, and some at a time."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from brim.bench.answers import Answered
from brim.bench.serving.session import Client, Figure, Session, needed, together
from brim.bench.stats import percentile
from brim.bench.workload import SEED, RecordedRequest
from brim.errors import EngineError

GOOD_TTFT_S = 5.0
"""A reader waits that long for a first word before the attention wanders: half of the ten seconds
that are the usual limit for keeping it.  Source: Nielsen, Usability Engineering, 1993, ch. 5."""

GOOD_TIME_PER_TOKEN_S = 0.2
"""People read about 240 words a minute, five tokens a second: slower text keeps them waiting.
Source: Brysbaert, How many words do we read per minute?, 2019 (238 words of non-fiction)."""


class Recorded(msgspec.Struct, frozen=True, kw_only=True):
    """What is sent by the two workloads of this module."""

    requests: tuple[RecordedRequest, ...]
    rates_per_s: tuple[float, ...] = (0.5, 1.0, 2.0)
    requests_per_rate: int = 6
    concurrencies: tuple[int, ...] = (1,)


def arrivals_s(rate_per_s: float, number: int) -> list[float]:
    """Seconds from the start at which requests of a Poisson process arrive, the same in every run.

    Example:
        >>> arrivals_s(2.0, 3) == arrivals_s(2.0, 3)
        True
    """
    rng = random.Random(f"{SEED}/{rate_per_s}")
    found, now_s = [], 0.0
    for _ in range(number):
        now_s += rng.expovariate(rate_per_s)
        found.append(now_s)
    return found


def load_at_rates(recorded: Recorded) -> Callable[[Session], Awaitable[list[Figure]]]:
    """The workload that sends recorded requests at each rate in turn, whatever comes back."""

    async def load(session: Session) -> list[Figure]:
        """Recorded requests at rising rates: who is answered well, how soon, and who is not."""
        found: list[Figure] = []
        requests = session.recorded(recorded.requests)
        for place, rate in enumerate(recorded.rates_per_s):
            first = place * recorded.requests_per_rate
            chosen = [
                requests[(first + number) % len(requests)].salted(f"Rate {rate:g}.")
                for number in range(recorded.requests_per_rate)
            ]
            found += await _at_rate(session, rate, chosen)
        return found

    return load


async def _at_rate(
    session: Session, rate_per_s: float, requests: Sequence[RecordedRequest]
) -> list[Figure]:
    async def one(arrival_s: float, request: RecordedRequest) -> Answered:
        await asyncio.sleep(arrival_s)
        with session.client() as client:
            return await client.try_ask(session.shaped(request))

    times = arrivals_s(rate_per_s, len(requests))
    answers, wall_s = await together(*map(one, times, requests))
    return load_figures(answers, wall_s, at=f"{rate_per_s:g}/s")


def load_figures(answers: Sequence[Answered], wall_s: float, *, at: str) -> list[Figure]:
    """What a rate of requests came to; a rate that nobody was answered at has counts alone."""
    whole = [answer for answer in answers if answer.error is None and answer.ttft_s is not None]
    good = [answer for answer in whole if _is_good(answer)]
    figures = {
        "goodput_req_s": len(good) / wall_s,
        "good_fraction": len(good) / len(answers),
        "num_refused": float(sum(answer.status == 503 for answer in answers)),
        "num_failed": float(sum(a.status != 503 for a in answers) - len(whole)),
    }
    rates = [a.time_per_token_s for a in whole if a.time_per_token_s is not None]
    if whole and rates:
        ttft = [answer.ttft_s for answer in whole if answer.ttft_s is not None]
        figures |= {
            "ttft_p50_s": percentile(ttft, 50),
            "ttft_p95_s": percentile(ttft, 95),
            "time_per_token_p95_s": percentile(rates, 95),
        }
    return [Figure(name=name, value=value, at=at) for name, value in figures.items()]


def _is_good(answer: Answered) -> bool:
    """Whether a reader would not have had to wait; a single token has no time per token."""
    return (answer.ttft_s or 0.0) <= GOOD_TTFT_S and (
        answer.time_per_token_s or 0.0
    ) <= GOOD_TIME_PER_TOKEN_S


def some_at_a_time(recorded: Recorded) -> Callable[[Session], Awaitable[list[Figure]]]:
    """The workload that sends all recorded requests over a number of connections."""

    async def rounds(session: Session) -> list[Figure]:
        """All recorded requests in order, some at a time."""
        found: list[Figure] = []
        for concurrency in recorded.concurrencies:
            # Salted for each pass too: a later one must not find the earlier one's KV.
            requests = [
                request.salted(f"Clients {concurrency}.")
                for request in session.recorded(recorded.requests)
            ]
            found += await _round(session, requests, concurrency)
        return found

    return rounds


async def _round(
    session: Session, requests: Sequence[RecordedRequest], concurrency: int
) -> list[Figure]:
    waiting = list(requests)[::-1]
    answers: list[Answered] = []

    async def one() -> None:
        with session.client() as client:
            while waiting:
                answers.append(await _checked(session, client, waiting.pop()))

    start_s = time.perf_counter()
    await together(*(one() for _ in range(min(concurrency, len(requests)))))
    wall_s = time.perf_counter() - start_s
    ttft = [needed(answer.ttft_s, "first token") for answer in answers]
    rates = [a.time_per_token_s for a in answers if a.time_per_token_s is not None]
    gaps = [a.longest_gap_s for a in answers if a.longest_gap_s is not None]
    if not rates or not gaps:
        raise EngineError("no answer was long enough for a rate; give requests with more tokens")
    num_tokens = sum(answer.num_completion_tokens for answer in answers)
    figures = {
        "output_tok_s": num_tokens / wall_s,
        "ttft_p50_s": percentile(ttft, 50),
        "ttft_p95_s": percentile(ttft, 95),
        "time_per_token_p50_s": percentile(rates, 50),
        "time_per_token_p95_s": percentile(rates, 95),
        "longest_gap_p95_s": percentile(gaps, 95),
    }
    return [
        Figure(name=name, value=value, at=f"{concurrency} at once")
        for name, value in figures.items()
    ]


async def _checked(session: Session, client: Client, request: RecordedRequest) -> Answered:
    answer = session.check(await client.try_ask(session.shaped(request)), request.id)
    session.count(answer)
    return answer
