"""Three models that do not fit, a browser that grows, and the kernel's own limit: what happens?

brim runs in a control group of 4.5 GiB with 1 GiB of swap, beside a process that grows to 1.8 GiB
and shrinks again as a browser does.  Three models of 1.8 GB by plan take mixed traffic for two
minutes: chats, long prompts, clients that leave.  Every answer is greedy and compared with the one
given without a limit.  The same is then asked of a server that is not governed and was made to
load everything.  Needs root, Linux and a memory controller.

    python benches/pressure.py [--seconds 120] [--clients 6] [--only governed] \
        [--json FILE] [--plot FILE]

Aims, governed: no kill by the kernel, no storm of major faults, every accepted request answered
once and right.  Not governed: a kill, or faults and latency ten times as high.
"""

import argparse
import asyncio
import math
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib as mpl
import msgspec
from harness import describe_machine
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from support.cgroup import unavailable_reason
from support.pressure import (
    LIMIT_BYTES,
    NEEDED_BYTES,
    REAL_LAYERS,
    SWAP_BYTES,
    Pressed,
    roomy_server,
    run_pressed,
)
from support.traffic import Errand, errands_of, reference_answers

from brim.bench.stats import percentile

GIB = 2**30
STORM_PER_S = 200.0
"""Major faults: at 0.1 ms each a fiftieth of the time is spent waiting for pages."""

SHOWN_KINDS = {
    "stance changed": "tab:red",
    "kv shrunk": "tab:orange",
    "kv grown": "tab:green",
    "model unloaded": "tab:purple",
    "model loaded": "tab:blue",
}


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """One server's two minutes."""

    name: str
    seconds: float
    num_replies: int
    num_accepted: int
    num_whole: int
    """Accepted ones that came once, whole and right."""
    num_left: int
    """Of these, clients that had left."""
    faults: dict[str, int]
    num_given_up: int
    """Refused for longer than clients are patient."""
    num_refusals: int
    num_oom_kills: int
    is_browser_alive: bool
    idle_major_faults_per_s: float
    worst_major_faults_per_s: float
    """In any five seconds."""
    num_major_faults: int
    ready_bytes: int
    peak_bytes: int
    most_swap_bytes: int
    p50_s: float
    p95_s: float
    ttft_p50_s: float
    ttft_p95_s: float
    events: dict[str, int]
    samples: list[tuple[float, int, int, int, int]]
    """(seconds, used, browser, swap, major faults) of the group over time."""
    log: list[tuple[float, str, str, str]]
    """(seconds, kind, model, cause) of what the server did."""

    @property
    def has_failed(self) -> bool:
        """Whether a server that is governed would have missed an aim."""
        return bool(
            self.num_oom_kills
            or self.faults
            or not self.is_browser_alive
            or self.worst_major_faults_per_s > self.idle_major_faults_per_s + STORM_PER_S
        )


def outcome(
    name: str, found: Pressed, seconds: float, references: dict[tuple[str, str], str]
) -> Outcome:
    """The figures of one run."""
    faults = found.faults(references)
    whole = [each for each in found.accepted if not each.fault(references)]
    durations_s = [reply.duration_s for reply in found.replies] or [math.inf]
    # Whoever never saw text waited at least until the end of the attempt.
    firsts_s = [
        reply.duration_s if reply.ttft_s is None else reply.ttft_s for reply in found.replies
    ] or [math.inf]
    start_s = found.samples[0].at_unix_s
    log = [
        (
            event["at_unix_s"] - start_s,
            str(event["kind"]),
            str(event.get("model", "")),
            str(event.get("cause", "")),
        )
        for event in found.events
        if event["at_unix_s"] >= start_s
    ]
    return Outcome(
        name=name,
        seconds=seconds,
        num_replies=len(found.replies),
        num_accepted=len(found.accepted),
        num_whole=len(whole),
        num_left=sum(each.has_left for each in whole),
        faults=dict(Counter(fault.partition(": ")[2][:100] for fault in faults)),
        num_given_up=sum(reply.status in (429, 503) for reply in found.replies),
        num_refusals=sum(reply.num_refusals for reply in found.replies),
        num_oom_kills=found.num_oom_kills,
        is_browser_alive=found.is_browser_alive,
        idle_major_faults_per_s=found.idle_major_faults_per_s,
        worst_major_faults_per_s=found.worst_major_faults_per_s,
        num_major_faults=found.after.num_major_faults - found.before.num_major_faults,
        ready_bytes=found.before.used_bytes,
        peak_bytes=found.after.peak_bytes,
        most_swap_bytes=max(sample.usage.swap_bytes for sample in found.samples),
        p50_s=percentile(durations_s, 50),
        p95_s=percentile(durations_s, 95),
        ttft_p50_s=percentile(firsts_s, 50),
        ttft_p95_s=percentile(firsts_s, 95),
        events=dict(Counter(kind for _, kind, _, _ in log)),
        samples=[
            (
                round(sample.at_unix_s - start_s, 2),
                sample.usage.used_bytes,
                sample.browser_bytes,
                sample.usage.swap_bytes,
                sample.usage.num_major_faults,
            )
            for sample in found.samples
        ],
        log=log,
    )


def references() -> tuple[list[Errand], dict[tuple[str, str], str]]:
    """What the models answer without any limit."""
    errands = [errand for model in REAL_LAYERS for errand in errands_of(model)]
    with (
        tempfile.TemporaryDirectory() as directory,
        roomy_server(Path(directory)) as server,
    ):
        return asyncio.run(reference_answers(server.url, errands))


def show(outcomes: list[Outcome]) -> None:
    """The runs side by side."""
    rows: list[tuple[str, list[object]]] = [
        ("requests", [each.num_replies for each in outcomes]),
        ("accepted", [each.num_accepted for each in outcomes]),
        ("whole and right", [each.num_whole for each in outcomes]),
        ("at fault", [sum(each.faults.values()) for each in outcomes]),
        ("given up after refusals", [each.num_given_up for each in outcomes]),
        ("refused for now", [each.num_refusals for each in outcomes]),
        ("processes killed", [each.num_oom_kills for each in outcomes]),
        ("browser survived", [each.is_browser_alive for each in outcomes]),
        ("major faults/s, idle", [f"{each.idle_major_faults_per_s:.0f}" for each in outcomes]),
        ("major faults/s, worst 5 s", [f"{e.worst_major_faults_per_s:.0f}" for e in outcomes]),
        ("peak GiB", [f"{each.peak_bytes / GIB:.2f}" for each in outcomes]),
        ("most in swap GiB", [f"{each.most_swap_bytes / GIB:.2f}" for each in outcomes]),
        ("answer p50 s", [f"{each.p50_s:.2f}" for each in outcomes]),
        ("answer p95 s", [f"{each.p95_s:.2f}" for each in outcomes]),
        ("first text p50 s", [f"{each.ttft_p50_s:.2f}" for each in outcomes]),
        ("first text p95 s", [f"{each.ttft_p95_s:.2f}" for each in outcomes]),
    ]
    print(f"{'':28}" + "".join(f"{each.name:>14}" for each in outcomes))
    for label, values in rows:
        print(f"{label:28}" + "".join(f"{value!s:>14}" for value in values))
    for each in outcomes:
        print(f"{each.name}: {each.events}")
        for fault, number in each.faults.items():
            print(f"  {number} x {fault}")


def plot(outcomes: list[Outcome], path: Path) -> None:
    """Memory of the group over time, what the browser has of it, and what the server did."""
    # The same figures give the same file, so that a diff means a change.
    mpl.rcParams |= {"svg.hashsalt": "brim", "font.size": 9}
    figure = Figure(figsize=(9, 3.2 * len(outcomes)))
    panes: Any = figure.subplots(len(outcomes), 1, sharex=True, squeeze=False)
    for (pane,), each in zip(panes, outcomes, strict=True):
        at_s = [sample[0] for sample in each.samples]
        used = [sample[1] / GIB for sample in each.samples]
        browser = [sample[2] / GIB for sample in each.samples]
        swap = [sample[3] / GIB for sample in each.samples]
        pane.fill_between(at_s, used, color="0.85", label="all of the group")
        pane.fill_between(at_s, browser, color="tab:cyan", alpha=0.6, label="browser")
        pane.plot(at_s, swap, color="black", linewidth=1, label="in swap")
        pane.axhline(LIMIT_BYTES / GIB, color="tab:red", linewidth=1, label="limit")
        for kind, colour in SHOWN_KINDS.items():
            times_s = [when_s for when_s, what, _, _ in each.log if what == kind]
            if times_s:
                height = 0.97 - 0.05 * list(SHOWN_KINDS).index(kind)
                pane.plot(
                    times_s,
                    [height * LIMIT_BYTES / GIB] * len(times_s),
                    "|",
                    color=colour,
                    markersize=8,
                    label=kind,
                )
        pane.set_title(
            f"{each.name}: {each.num_whole} of {each.num_replies} requests answered right, "
            f"{each.num_oom_kills} processes killed, answers after {each.p50_s:.1f} s (p50)",
            loc="left",
        )
        pane.set_ylabel("GiB")
        pane.set_ylim(0, LIMIT_BYTES / GIB * 1.04)
        pane.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    panes[-1][0].set_xlabel("seconds")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> int:
    """Run both, print, and write what was asked for; exit 1 where an aim was missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--only", choices=("governed", "by force"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    if reason := unavailable_reason(with_swap=True, needs_bytes=NEEDED_BYTES):
        raise SystemExit(f"no real pressure can be made here: {reason}")
    print(describe_machine(), flush=True)
    errands, texts = references()
    print(f"{len(errands)} errands with an answer beyond doubt", flush=True)
    outcomes = []
    for name in ("governed", "by force"):
        if args.only in (None, name):
            with tempfile.TemporaryDirectory() as directory:
                found = run_pressed(
                    Path(directory),
                    errands,
                    is_governed=name == "governed",
                    seconds=args.seconds,
                    num_clients=args.clients,
                    swap_bytes=SWAP_BYTES,
                )
            outcomes.append(outcome(name, found, args.seconds, texts))
            print(f"{name}: done", flush=True)
    show(outcomes)
    if args.json is not None:
        args.json.write_bytes(msgspec.json.encode(outcomes) + b"\n")
    if args.plot is not None:
        plot(outcomes, args.plot)
    return int(any(each.has_failed for each in outcomes if each.name == "governed"))


if __name__ == "__main__":
    sys.exit(main())
