"""What each overflow policy costs in a long conversation: seconds and tokens computed, per turn.

One conversation of made-up turns is sent turn by turn, as chat clients do: everything so far with
every request, and one token as the answer.  Without overflow it goes to a server whose window holds
all of it; with each policy to one whose window it outgrows several times.  Only turns from the
first overflow on are compared, and the prefix cache on disk is off: what is reused is in memory.

    python benches/overflow_cost.py [MODEL] [--context 1024] [--turns 36] [--policy NAME ...]
                                    [--results FILE]

With --results the figures are kept in a file, and runs of single policies add up to one table.
"""

import argparse
import itertools
import json
import random
import statistics
import time
import urllib.request
from pathlib import Path
from typing import Any

import msgspec
from harness import brim_serve, describe_machine, serving
from make_standin import default_path

POLICIES = ("none", "trim", "shift", "summarize")

TURN_WORDS, ANSWER_WORDS = 36, 24
"""Of a user's message and of the answer to it: about a hundred tokens a turn with their marks."""

WORDS = (
    "the a of and to in is that for it as with on by this from at an be which or are was not "
    "water house letter morning train garden number river paper window question story answer "
    "green small early quiet simple heavy open round bright walks reads finds keeps turns moves "
    "near under before after between without again often perhaps almost never always"
).split()


class Turn(msgspec.Struct):
    """What one request took."""

    wall_s: float
    num_prompt_tokens: int
    num_computed_tokens: int
    """Of the prompt, and to write a summary: read by the model, or written."""
    summary_s: float = 0.0
    num_removed_tokens: int = 0


Results = dict[str, list[Turn]]


def talk(num_turns: int) -> list[dict[str, str]]:
    """System prompt, then user and assistant in turn; the same at every call."""
    draw = random.Random(1)

    def text(num_words: int) -> str:
        return " ".join(draw.choices(WORDS, k=num_words)).capitalize() + "."

    messages = [{"role": "system", "content": text(60)}]
    for _ in range(num_turns):
        messages.append({"role": "user", "content": text(TURN_WORDS)})
        messages.append({"role": "assistant", "content": text(ANSWER_WORDS)})
    return messages


def ask(url: str, model: str, policy: str, messages: list[dict[str, str]]) -> Turn:
    """One request, answered by one token."""
    options = {"cache": {"namespace": policy}, "overflow": "reject" if policy == "none" else policy}
    body = {"model": model, "messages": messages, "max_tokens": 1, "temperature": 0}
    data = json.dumps(body | {"brim": options}).encode()
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", data, {"content-type": "application/json"}
    )
    start_s = time.perf_counter()
    with urllib.request.urlopen(request, timeout=600) as response:
        answer: dict[str, Any] = json.load(response)
    wall_s = time.perf_counter() - start_s
    num_prompt = answer["usage"]["prompt_tokens"]
    turn = Turn(wall_s, num_prompt, num_prompt - answer["brim"]["cache"]["cached_tokens"])
    done = answer["brim"]["overflow"]
    if done is not None:
        turn.summary_s = done["summary_s"]
        turn.num_removed_tokens = done["num_removed_tokens"]
        turn.num_computed_tokens += (
            done["num_summary_prompt_tokens"]
            - done["num_summary_cached_tokens"]
            + done["num_summary_completion_tokens"]
        )
    return turn


def measure(model: str, policy: str, context_tokens: int, num_turns: int) -> list[Turn]:
    """The whole conversation with one policy, on a server of its own."""
    messages = talk(num_turns)
    window = context_tokens
    if policy == "none":
        # About 1.6 tokens a word with the marks of a turn: twice that holds all of it.
        window = max(window, num_turns * (TURN_WORDS + ANSWER_WORDS) * 3)
    command = brim_serve(model, "--context", str(window), "--no-cache")
    with serving(command) as served:
        with urllib.request.urlopen(f"{served.url}/v1/models", timeout=60) as response:
            name = json.load(response)["data"][0]["id"]
        return [
            ask(served.url, name, policy, messages[: 2 + 2 * number]) for number in range(num_turns)
        ]


def report(results: Results) -> None:
    """A row for each policy; turns count from the first one that any policy cut."""
    first = min(
        (
            next(n for n, turn in enumerate(turns) if turn.num_removed_tokens)
            for turns in results.values()
            if any(turn.num_removed_tokens for turn in turns)
        ),
        default=0,
    )
    base = results.get("none")
    base_s = sum(turn.wall_s for turn in base[first:]) if base else None
    print(f"turns {first + 1} to {max(map(len, results.values()))}, answers of one token")
    print("| policy | s, all turns | to none | s, median turn | s, worst | tokens computed, all "
          "| turns that cut | s for summaries |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    for policy in POLICIES:
        if policy not in results:
            continue
        turns = results[policy][first:]
        walls = [turn.wall_s for turn in turns]
        ratio = "" if base_s is None else f"{sum(walls) / base_s:.2f}"
        removed = [turn.num_removed_tokens for turn in results[policy][max(0, first - 1) :]]
        num_cuts = sum(a != b for a, b in itertools.pairwise(removed))
        print(
            f"| {policy} | {sum(walls):.1f} | {ratio} | {statistics.median(walls):.2f} "
            f"| {max(walls):.2f} | {sum(turn.num_computed_tokens for turn in turns)} "
            f"| {num_cuts} | {sum(turn.summary_s for turn in turns):.1f} |"
        )


def main() -> None:
    """Measure, add to what is known, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default=str(default_path()))
    parser.add_argument("--context", type=int, default=1024, help="window in tokens")
    parser.add_argument("--turns", type=int, default=36)
    parser.add_argument("--policy", action="append", choices=POLICIES)
    parser.add_argument("--results", type=Path, help="file that keeps figures between runs")
    arguments = parser.parse_args()
    results: Results = {}
    if arguments.results is not None and arguments.results.exists():
        results = msgspec.json.decode(arguments.results.read_bytes(), type=Results)
    for policy in arguments.policy or POLICIES:
        results[policy] = measure(arguments.model, policy, arguments.context, arguments.turns)
        if arguments.results is not None:
            arguments.results.write_bytes(msgspec.json.encode(results))
    print(f"{describe_machine()}; window {arguments.context} tokens")
    report(results)


if __name__ == "__main__":
    main()
