"""Workloads of several clients at once: a stall, a shared prefix, separate prompts."""

import asyncio
import contextlib
import itertools
import time
from collections.abc import Sequence

from brim.bench.answers import Answered
from brim.bench.serving.session import Client, Figure, Session, needed, together
from brim.bench.stats import percentile
from brim.bench.workload import Turn
from brim.errors import EngineError

NUM_SHARING = 4
"""Clients that share a prefix: as many as llama-server has slots unless told otherwise."""

NUM_SEPARATE = 8
"""Clients with prompts of their own: a small team, or one program that asks in parallel."""

MIN_PIECES = 4
"""Pieces of text that the decoding client has before the long prompt arrives: it surely decodes."""

POLL_S = 0.01
"""Between looks at how far the decoding client is; short beside any gap that matters."""


async def stall(session: Session) -> list[Figure]:
    """One client decodes while another one's long prompt is read."""
    alone_s, _, _ = await _long_prompt(session, "alone")
    with session.client() as reader:
        times: list[float] = []
        decoding = asyncio.create_task(_decode_on(session, reader, times))
        try:
            while len(times) + len(reader.text_times()) < MIN_PIECES:
                if decoding.done():
                    decoding.result()
                await asyncio.sleep(POLL_S)
            beside_s, start_s, first_s = await _long_prompt(session, "beside")
        finally:
            decoding.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await decoding
        # A request that was only about to be sent leaves the last one's reply in place.
        times = sorted({*times, *reader.text_times()})
    return [
        Figure(name="longest_gap_s", value=longest_gap_s(times, start_s, first_s)),
        Figure(name="ttft_alone_s", value=alone_s),
        Figure(name="ttft_beside_s", value=beside_s),
        Figure(name="ttft_growth", value=beside_s / alone_s),
    ]


async def _long_prompt(session: Session, label: str) -> tuple[float, float, float]:
    """Time to first token; when it was sent, and when its first token came."""
    sizes = session.sizes
    text = session.texts.text(label, sizes.stall_prompt_tokens)
    with session.client() as client:
        start_s = time.perf_counter()
        answer = await client.ask(label, text, sizes.short_answer_tokens)
    ttft_s = needed(answer.ttft_s, "first token")
    return ttft_s, start_s, start_s + ttft_s


async def _decode_on(session: Session, client: Client, times: list[float]) -> None:
    """Decode until cancelled; the times of answers that ended are added to `times`.

    An answer that ends is followed by the next question at once: its wait for a first token then
    counts as a gap, so that nothing is hidden by a server or a machine that is too fast.
    """
    sizes = session.sizes
    for number in itertools.count():
        text = session.texts.text(f"decoding {number}", sizes.short_prompt_tokens)
        # How many such answers fit depends on the server's speed: they are not compared by label.
        request = session.request(f"decoding {number}", text, sizes.running_answer_tokens)
        session.check(await client.try_ask(request), "the decoding client")
        times += client.text_times()


def longest_gap_s(times: Sequence[float], start_s: float, end_s: float) -> float:
    """Longest pause between neighbouring times that touches the span.

    Raises:
        EngineError: No pause touches it.

    Example:
        >>> longest_gap_s([0.0, 1.0, 3.0, 9.0], 0.5, 2.5)
        2.0
    """
    gaps = [b - a for a, b in itertools.pairwise(times) if b > start_s and a < end_s]
    if not gaps:
        raise EngineError("the decoding client had no text while the long prompt was read")
    return max(gaps)


async def shared_prefix(session: Session) -> list[Figure]:
    """Clients with one long system prompt and questions of their own, two turns each, at once."""
    system = Turn("system", session.texts.text("system", session.sizes.shared_prompt_tokens))
    before = session.server.dirty_bytes()
    found, wall_s = await together(
        *(_two_turns(session, system, number) for number in range(NUM_SHARING))
    )
    after = session.server.dirty_bytes()
    figures = [
        Figure(name="wall_s", value=wall_s),
        Figure(name="ttft_first_p50_s", value=percentile([first for first, _ in found], 50)),
        Figure(name="ttft_first_max_s", value=max(first for first, _ in found)),
        Figure(name="ttft_second_p50_s", value=percentile([second for _, second in found], 50)),
    ]
    if before is not None and after is not None:
        figures.append(Figure(name="memory_growth_bytes", value=after - before))
    return figures


async def _two_turns(session: Session, system: Turn, number: int) -> tuple[float, float]:
    """Times to first token of a question and of one that goes on from its answer."""
    sizes = session.sizes
    turns, found = [system], []
    with session.client() as client:
        for turn in range(2):
            label = f"client {number} turn {turn}"
            turns.append(Turn("user", session.texts.text(label, sizes.question_tokens)))
            answer = await client.ask(
                label, turns, sizes.short_answer_tokens, is_same_text=turn == 0
            )
            found.append(needed(answer.ttft_s, "first token"))
            turns.append(Turn("assistant", answer.text))
    return found[0], found[1]


async def throughput(session: Session) -> list[Figure]:
    """Clients with separate prompts at once: tokens a second of all, times to first token."""
    answers, wall_s = await together(
        *(_separate(session, f"client {number}") for number in range(NUM_SEPARATE))
    )
    num_tokens = sum(answer.num_completion_tokens for answer in answers)
    ttft = [needed(answer.ttft_s, "first token") for answer in answers]
    times = [answer.time_per_token_s for answer in answers]
    figures = [
        Figure(name="output_tok_s", value=num_tokens / wall_s),
        Figure(name="ttft_p50_s", value=percentile(ttft, 50)),
        Figure(name="ttft_p95_s", value=percentile(ttft, 95)),
    ]
    if all(times):
        # Of each client after its own first token: tells a slow decode from slow prompts.
        rates = [1 / time_s for time_s in times if time_s]
        figures.append(Figure(name="client_decode_p50_tok_s", value=percentile(rates, 50)))
    return figures


async def _separate(session: Session, label: str) -> Answered:
    sizes = session.sizes
    text = session.texts.text(label, sizes.separate_prompt_tokens)
    with session.client() as client:
        return await client.ask(label, text, sizes.separate_answer_tokens)
