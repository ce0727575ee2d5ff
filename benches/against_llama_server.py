"""brim beside llama-server on one GGUF: every workload of `brim bench serve`, and every promise.

    python benches/against_llama_server.py [MODEL.gguf] [--llama-server PROGRAM] [--quick]
        [--objective decode|prefill|both] [--workload NAME ...] [--best-flags] [--write]

MODEL is the stand-in of make_standin.py unless given.  All of it takes about ten minutes on two
cores; `--quick` measures once what promises are about, in three; `--workload` splits it, and
`--write` puts what was measured beside what docs/serving.json and docs/benchmarks.md hold already.

- `brim` is `brim serve -m MODEL` with nothing else but a prefix cache directory of its own, empty
  at the start; with `--objective prefill` it has that flag, and only single stream and cold
  prompts are measured, which is where the objectives differ.
- `llama-server` is what a user runs who expects eight clients: `-np 8`, one KV pool for all slots
  (`-kvu`, its own default where `-np` is left out), a window of 16,384 tokens in it, everything
  else its default.
- `llama-server, best flags` (`--best-flags`) adds what is known to help it here: weights that are
  not repacked, which reads prompts faster, and reuse of cached pieces behind a change.
"""

import argparse
import asyncio
import secrets
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec
from make_standin import default_path
from serving_promises import (
    BRIM,
    LLAMA,
    Held,
    Published,
    print_verdicts,
    read,
    verdicts,
    write,
    write_table,
)

from brim.bench import workload as recorded_requests
from brim.bench.client import Connection
from brim.bench.serving.beside import NUM_SHARING, shared_prefix
from brim.bench.serving.harness import PATIENCE_S, Comparison, Wanted, wording_of
from brim.bench.serving.mixed import Recorded
from brim.bench.serving.plot import check_plot, draw
from brim.bench.serving.report import Report
from brim.bench.serving.server import Server, ServerCommand
from brim.bench.serving.session import Session
from brim.bench.serving.sizes import Sizes
from brim.bench.serving.texts import Texts
from brim.bench.serving.workloads import choose
from brim.cli.bench_serve import print_report
from brim.errors import BrimError
from brim.machine.reading import machine_at_hand

DOCS = Path(__file__).parent.parent / "docs"

LLAMA_FLAGS = "-np 8 -kvu -c 16384"
BEST_FLAGS = "--no-repack --cache-reuse 256"

PROMISED = ("single", "cold", "stall", "shared-prefix", "restart", "throughput")
"""What promises are about; the rest describes."""

PREFILL_WORKLOADS = ("single", "cold")

REPETITIONS = {"load": 1, "depth": 1, "agents": 1}
"""Of the long workloads; all others have `--repetitions`."""

STATS_AGE_S = 6.0
"""A gateway's counters of its worker are up to five seconds old."""


# Being told to stop must stop the servers too: as an exception, so that every `finally` runs.
signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def main() -> None:
    """Measure, publish if asked to, and print every promise with its verdict."""
    args = options()
    published = read(DOCS / "serving.json") if args.write else Published()
    with tempfile.TemporaryDirectory(prefix="brim-bench-cache-") as cache:
        for objective in ("decode", "prefill"):
            if args.objective in (objective, "both"):
                measure(args, objective, Path(cache), published)
        if args.objective != "prefill" and "shared-prefix" in wanted_names(args, "decode"):
            command = brim_command(args.model, "decode", Path(cache))
            published.held = asyncio.run(held_cells(command))
    if args.write:
        write(published, DOCS / "serving.json")
        write_table(published, DOCS / "benchmarks.md")
    print_verdicts(verdicts(published))


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default=str(default_path()))
    parser.add_argument("--llama-server", default=shutil.which("llama-server"))
    parser.add_argument("--objective", choices=("decode", "prefill", "both"), default="both")
    parser.add_argument("--workload", action="append", default=[])
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--best-flags", action="store_true")
    parser.add_argument("--force", action="store_true", help="measure even a busy machine")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--plot", type=Path, help="a folder for an SVG of each run")
    args = parser.parse_args()
    if not args.llama_server or not shutil.which(args.llama_server):
        print("llama-server was not found, so brim is measured alone: name it by --llama-server")
        args.llama_server = None
    if args.plot:
        args.plot.mkdir(parents=True, exist_ok=True)
        check_plot(args.plot / "x.svg")
    return args


def wanted_names(args: argparse.Namespace, objective: str) -> list[str]:
    """The workloads of one objective, in the order in which they run."""
    asked = args.workload or list(PROMISED if args.quick else (*PROMISED, *REPETITIONS))
    return [name for name in asked if objective == "decode" or name in PREFILL_WORKLOADS]


def measure(args: argparse.Namespace, objective: str, cache: Path, published: Published) -> None:
    """All workloads of one objective: the promised ones several times, the long ones once."""
    names = wanted_names(args, objective)
    repetitions = 1 if args.quick else args.repetitions
    once = [name for name in names if name in REPETITIONS]
    several = [name for name in names if name not in REPETITIONS]
    for group, times in ((several, repetitions), (once, 1)):
        if not group:
            continue
        try:
            report = asyncio.run(run(args, objective, cache, group, times))
        except BrimError as exc:
            raise SystemExit(exc.message) from exc
        print_report(report)
        for complaint in report.complaints:
            print(f"note: {complaint}")
        if args.plot:
            path = args.plot / f"serving-{objective}-{'-'.join(group)}.svg"
            draw(report, path)
            print(f"the plot is in {path}")
        if report.was_interrupted:
            raise SystemExit("interrupted: nothing of this run is published")
        published.take(objective, report)


async def run(
    args: argparse.Namespace, objective: str, cache: Path, names: Sequence[str], repetitions: int
) -> Report:
    """One run of the harness."""
    sources = [brim_command(args.model, objective, cache)]
    if args.llama_server:
        sources = [*llama_commands(args), *sources]
    wanted = Wanted(
        sources=tuple(sources),
        workloads=tuple(choose(names, Recorded(requests=tuple(recorded_requests.load())))),
        repetitions=repetitions,
        seed=secrets.randbelow(2**32),
        must_be_calm=not args.force,
        patience_s=0.0 if args.force else PATIENCE_S,
    )
    comparison = Comparison(wanted, machine_at_hand(), progress=lambda text: say(text))
    return await comparison.measure()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def brim_command(model: str, objective: str, cache: Path) -> ServerCommand:
    """The server of brim on its defaults, with an empty prefix cache at the start."""
    words = [
        "env", f"BRIM_CACHE_DIRECTORY={cache / objective}",
        sys.executable, "-m", "brim", "serve", "-m", model,
    ]  # fmt: skip
    if objective != "decode":
        words += ["--objective", objective]
    return ServerCommand(name=BRIM, command=f"{shlex.join(words)} --port {{port}}")


def llama_commands(args: argparse.Namespace) -> list[ServerCommand]:
    """llama-server as a user runs it, and with the best flags that are known."""
    base = f"{shlex.join([args.llama_server, '-m', args.model])} {LLAMA_FLAGS} --port {{port}}"
    found = [ServerCommand(name=LLAMA, command=base)]
    if args.best_flags:
        found.append(ServerCommand(name=f"{LLAMA}, best flags", command=f"{base} {BEST_FLAGS}"))
    return found


# --- is a shared prefix held once? ---------------------------------------------------------------


class _Prefix(msgspec.Struct):
    num_idle_tokens: int


class _Stats(msgspec.Struct):
    prefix: _Prefix


class _Status(msgspec.Struct):
    worker_stats: _Stats | None = None


async def held_cells(command: ServerCommand) -> Held | None:
    """KV cells after the `shared-prefix` workload on a fresh server; None where it fails."""
    server = Server(command, machine_at_hand())
    try:
        await server.open()
        takes_chat = server.target.takes_chat
        wording = await wording_of(server, takes_chat=takes_chat)
        texts = Texts(secrets.randbelow(2**32), 0, "held", wording)
        session = Session(server, texts, Sizes(), takes_chat=takes_chat)
        before = await _idle_tokens(server)
        await shared_prefix(session)
        after = await _idle_tokens(server)
    except (BrimError, msgspec.DecodeError, IndexError) as exc:
        say(f"the cells of a shared prefix could not be read: {exc}")
        return None
    finally:
        await server.close()
    first = [asked for asked in session.asked if asked.label.endswith("turn 0")]
    # The second turn of a client holds its first.
    second = [asked for asked in session.asked if asked.label.endswith("turn 1")]
    prefix = min(asked.num_prompt_tokens for asked in first) - session.sizes.question_tokens
    return Held(
        num_cells=after - before,
        # A last drawn token is never fed, so it takes no cell.
        num_tokens=sum(a.num_prompt_tokens + a.num_completion_tokens - 1 for a in second),
        num_prefix_tokens=prefix,
        num_clients=NUM_SHARING,
    )


async def _idle_tokens(server: Server) -> int:
    """Cells that finished sequences hold, once the counters are no older than the last answer."""
    await asyncio.sleep(STATS_AGE_S)
    connection = Connection(msgspec.structs.replace(server.target.endpoint, base_path="/brim"))
    try:
        reply = await connection.get("/ps")
    finally:
        connection.close()
    (status,) = msgspec.json.decode(reply.body, type=list[_Status])
    if status.worker_stats is None:
        raise IndexError("the worker has told no counters yet")
    return status.worker_stats.prefix.num_idle_tokens


if __name__ == "__main__":
    main()
