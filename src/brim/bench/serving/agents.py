"""Agents: a long system prompt with tools, and a history that grows by a tool's result each turn.

Two variants.  In the second the system prompt begins with a line that is new in every request, as
Claude Code's billing line is: a server that takes it as it stands finds none of the rest in memory.
Source of that line: https://github.com/anthropics/claude-code/issues/68900.
"""

import statistics

from brim.bench.serving.session import Figure, Session, needed, together
from brim.bench.workload import Turn

NUM_AGENTS = 2
"""At work at once, with the same tools: an agent and one that it started."""

NUM_TURNS = 3
"""Requests of each agent; the first reads the tools, each later one a tool's result."""

VARIANTS = ("plain", "volatile header")


async def agents(session: Session) -> list[Figure]:
    """Agents that call tools: with a stable prompt, and with a line that always changes."""
    found: list[Figure] = []
    for variant in VARIANTS:
        results, wall_s = await together(
            *(_agent(session, variant, number) for number in range(NUM_AGENTS))
        )
        later = [ttft_s for times in results for ttft_s in times[1:]]
        found += [
            Figure(name="wall_s", value=wall_s, at=variant),
            Figure(
                name="ttft_first_p50_s",
                value=statistics.median(times[0] for times in results),
                at=variant,
            ),
            Figure(name="ttft_later_p50_s", value=statistics.median(later), at=variant),
        ]
    return found


async def _agent(session: Session, variant: str, number: int) -> list[float]:
    """Times to first token of one agent's requests."""
    sizes, texts = session.sizes, session.texts
    tools = texts.tools(f"{variant} tools", sizes.agent_system_tokens)
    history: list[Turn] = []
    found = []
    with session.client() as client:
        for turn in range(NUM_TURNS):
            label = f"{variant}, agent {number}, turn {turn}"
            what = "Result of the tool: " if turn else ""
            text = what + texts.text(label, sizes.tool_result_tokens)
            history.append(Turn("user", text))
            header = volatile_header(session, label) if variant == VARIANTS[1] else ""
            answer = await client.ask(
                label,
                [Turn("system", header + tools), *history],
                sizes.short_answer_tokens,
                # A server may know the line, and leave it out or move it.
                is_same_text=turn == 0 and not header,
            )
            found.append(needed(answer.ttft_s, "first token"))
            history.append(Turn("assistant", answer.text))
    return found


def volatile_header(session: Session, label: str) -> str:
    """A line in the form of Claude Code's, with a hash that is new for each label."""
    cch = session.texts.rng(f"{label} header").randrange(16**5)
    return f"x-anthropic-billing-header: cc_version=2.1.37.3a1; cc_entrypoint=cli; cch={cch:05x};\n"
