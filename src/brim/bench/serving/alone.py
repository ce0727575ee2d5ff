"""Workloads of one client: single stream, a cold prompt, growing depth, a restart."""

import asyncio
import statistics

from brim.bench.serving.session import Figure, Session, decode_rate, needed
from brim.errors import EngineError, Unsupported

NUM_SINGLE = 3
"""Requests of one turn of the single stream, of which the median counts."""

SETTLE_S = 2.0
"""Between an answer and the crash: a cache that writes behind the answer has a reader's pause to do
it in; what a crash within that time loses is another question."""

MAX_CACHED = 0.1
"""Share of a cold prompt that may come from memory: the template's first tokens, never its text."""


async def single(session: Session) -> list[Figure]:
    """One client, short prompts: decode rate and time to first token."""
    sizes = session.sizes
    with session.client() as client:
        answers = [
            await client.ask(
                f"question {number}",
                session.texts.text(f"question {number}", sizes.short_prompt_tokens),
                sizes.single_answer_tokens,
            )
            for number in range(NUM_SINGLE)
        ]
    return [
        Figure(name="decode_tok_s", value=statistics.median(map(decode_rate, answers))),
        Figure(
            name="ttft_s", value=statistics.median(needed(a.ttft_s, "first token") for a in answers)
        ),
    ]


async def cold(session: Session) -> list[Figure]:
    """One long prompt that nobody has seen: time to first token, prefill rate."""
    ttft_s, num_tokens = await cold_prompt(session)
    return [
        Figure(name="ttft_s", value=ttft_s),
        Figure(name="prefill_tok_s", value=num_tokens / ttft_s),
        Figure(name="num_prompt_tokens", value=num_tokens),
    ]


async def cold_prompt(session: Session) -> tuple[float, int]:
    """Time to first token of a prompt of the cold size, and its tokens.

    Raises:
        EngineError: The server says that it had the prompt in memory.
    """
    sizes = session.sizes
    with session.client() as client:
        answer = await client.ask(
            "the prompt", session.texts.text("the prompt", sizes.cold_prompt_tokens),
            sizes.short_answer_tokens,
        )  # fmt: skip
    if (answer.num_cached_tokens or 0) > MAX_CACHED * answer.num_prompt_tokens:
        raise EngineError(
            f"'{session.server.name}' had {answer.num_cached_tokens} of the "
            f"{answer.num_prompt_tokens} tokens of a new prompt in memory, so it was not cold; "
            "choose another --seed"
        )
    return needed(answer.ttft_s, "first token"), answer.num_prompt_tokens


async def depth(session: Session) -> list[Figure]:
    """One text that grows: decode rate at each depth, and time to first token of what was added."""
    found = []
    sizes = session.sizes
    with session.client() as client:
        for num_tokens in sizes.depths:
            label = f"{num_tokens} tokens"
            text = session.texts.text("the text", num_tokens)
            answer = await client.ask(label, text, sizes.short_answer_tokens * 2)
            ttft_s = needed(answer.ttft_s, "first token")
            found += [
                Figure(name="decode_tok_s", value=decode_rate(answer), at=label),
                Figure(name="ttft_s", value=ttft_s, at=label),
            ]
    return found


async def restart(session: Session) -> list[Figure]:
    """A cold prompt, a crash of the whole server, a new start, the same prompt again."""
    if not session.server.is_ours:
        raise Unsupported(
            "only a server that the harness starts (--server) can be killed and started again"
        )
    cold_s, _ = await cold_prompt(session)
    await asyncio.sleep(SETTLE_S)
    await session.server.kill()
    start_s = await session.server.open()
    with session.client() as client:
        again = await client.ask(
            "the prompt again",
            session.texts.text("the prompt", session.sizes.cold_prompt_tokens),
            session.sizes.short_answer_tokens,
        )
    again_s = needed(again.ttft_s, "first token")
    return [
        Figure(name="cold_ttft_s", value=cold_s),
        Figure(name="restart_ttft_s", value=again_s),
        Figure(name="restart_over_cold", value=again_s / cold_s),
        Figure(name="start_s", value=start_s),
    ]
