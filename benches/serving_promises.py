"""What brim promises beside llama-server, as limits on figures of `brim bench serve`, and the page.

A published run keeps one report for each workload and objective, so that runs which measure some
of them can be put together.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from brim.bench.serving.report import Report, Row

BRIM = "brim"
LLAMA = "llama-server"

BEGIN, END = "<!-- serving: begin -->", "<!-- serving: end -->"
"""Around what `write_table` writes."""


class Published(msgspec.Struct, kw_only=True):
    """All reports of one published run, and the cells that a shared prefix took."""

    reports: dict[str, Report] = {}
    """'OBJECTIVE: WORKLOAD' -> the report of that workload alone."""
    held: "Held | None" = None

    def take(self, objective: str, report: Report) -> None:
        """Put in what a run measured, workload by workload, in place of what was there."""
        for workload in dict.fromkeys(row.workload for row in report.rows):
            samples = tuple(
                msgspec.structs.replace(sample, asked=())
                for sample in report.samples
                if sample.workload == workload
            )
            self.reports[f"{objective}: {workload}"] = msgspec.structs.replace(
                report,
                samples=samples,
                rows=tuple(row for row in report.rows if row.workload == workload),
            )


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """KV cells after four clients with one prefix are done."""

    num_cells: int
    """That brim holds, of all clients together."""
    num_tokens: int
    """In the clients' sequences: the cells it would take to hold each on its own."""
    num_prefix_tokens: int
    num_clients: int

    @property
    def num_prefixes(self) -> float:
        """How many times the prefix is held.

        Example:
            >>> Held(num_cells=1000, num_tokens=3100, num_prefix_tokens=700,
            ...      num_clients=4).num_prefixes
            1.0
        """
        return self.num_clients - (self.num_tokens - self.num_cells) / self.num_prefix_tokens


def read(path: Path) -> Published:
    """What was published before; nothing where there is no such file."""
    if not path.exists():
        return Published()
    return msgspec.json.decode(path.read_bytes(), type=Published)


def write(published: Published, path: Path) -> None:
    """Write it in a form whose diff can be read, without this machine's folders."""
    text = json.dumps(msgspec.to_builtins(published), indent=1, sort_keys=True)
    path.write_text(without_folders(text) + "\n", encoding="utf-8")


def without_folders(text: str) -> str:
    """Paths cut to their last part: where things lie on one machine is nobody's measurement.

    Example:
        >>> without_folders("env DIR=/tmp/x/y /usr/bin/python -m brim serve -m /m/a.gguf")
        'env DIR=y python -m brim serve -m a.gguf'
    """
    return re.sub(r"(?:/[\w.+-]+)+/([\w.+-]+)", r"\1", text)


class Promise(msgspec.Struct, frozen=True, kw_only=True):
    """A limit on one figure."""

    words: str
    key: str
    """Which report: 'OBJECTIVE: WORKLOAD'."""
    value_of: Callable[[Report], float | None]
    limit: float
    is_least: bool = False
    """Whether the limit is from below."""

    def kept(self, value: float) -> bool:
        """Whether a value is within the limit."""
        return value >= self.limit if self.is_least else value <= self.limit


def median(workload: str, figure: str) -> Callable[[Report], float | None]:
    """The median of brim itself."""
    return lambda report: report.median(workload, BRIM, figure)


def ratio(workload: str, figure: str) -> Callable[[Report], float | None]:
    """The median ratio of brim to llama-server."""
    return lambda report: report.ratio(workload, BRIM, figure)


PROMISES = (
    Promise(
        words="largest gap of a decoding client beside a 1,000-token prompt, s",
        key="decode: stall", value_of=median("stall", "longest_gap_s"), limit=0.4,
    ),
    Promise(
        words="that prompt's time to first token, over being alone",
        key="decode: stall", value_of=median("stall", "ttft_growth"), limit=1.25,
    ),
    Promise(
        words="four clients with one prefix, wall time over llama-server's",
        key="decode: shared-prefix", value_of=ratio("shared-prefix", "wall_s"), limit=0.5,
    ),
    Promise(
        words="after a crash, time to first token over cold",
        key="decode: restart", value_of=median("restart", "restart_over_cold"), limit=0.1,
    ),
    Promise(
        words="objective prefill: cold prompt, time to first token over llama-server's",
        key="prefill: cold", value_of=ratio("cold", "ttft_s"), limit=0.75,
    ),
    Promise(
        words="objective prefill: single stream, tok/s over llama-server's",
        key="prefill: single", value_of=ratio("single", "decode_tok_s"), limit=0.85,
        is_least=True,
    ),
    Promise(
        words="single stream, tok/s over llama-server's",
        key="decode: single", value_of=ratio("single", "decode_tok_s"), limit=1.0, is_least=True,
    ),
    Promise(
        words="eight clients, total tok/s over llama-server's",
        key="decode: throughput", value_of=ratio("throughput", "output_tok_s"), limit=0.97,
        is_least=True,
    ),
    Promise(
        words="eight clients, median time to first token over llama-server's",
        key="decode: throughput", value_of=ratio("throughput", "ttft_p50_s"), limit=0.7,
    ),
)  # fmt: skip

MAX_PREFIXES = 1.1
"""A prefix is cut where the questions begin, give or take the words that they share by chance."""


def verdicts(published: Published) -> list[tuple[str, str, str, str]]:
    """Promise, limit, value and verdict of each, those that were not measured included."""
    found = []
    for promise in PROMISES:
        report = published.reports.get(promise.key)
        value = promise.value_of(report) if report else None
        limit = f"{'>=' if promise.is_least else '<='} {promise.limit:g}"
        found.append((promise.words, limit, *_verdict(value, promise.kept)))
    value = published.held.num_prefixes if published.held else None
    verdict = _verdict(value, lambda times: times <= MAX_PREFIXES)
    found.append(("times that the KV of the shared prefix is held", f"<= {MAX_PREFIXES}", *verdict))
    return found


def _verdict(value: float | None, kept: Callable[[float], bool]) -> tuple[str, str]:
    if value is None:
        return "-", "not measured"
    return f"{value:.3f}", "pass" if kept(value) else "FAIL"


def write_table(published: Published, page: Path) -> None:
    """Put verdicts and figures between the marks of a page.

    Raises:
        SystemExit: The page has no marks.
    """
    text = page.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{page} has no marks {BEGIN} and {END} to write between")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    lines = "\n".join(_table_lines(published))
    page.write_text(f"{before}{BEGIN}\n{lines}\n{END}{after}", encoding="utf-8")


def _table_lines(published: Published) -> list[str]:
    reports = published.reports
    machine = next((report.machine for report in reports.values()), "no machine")
    lines = [
        f"Machine class: {machine}. Medians, ranges in brackets; ratios are to `{LLAMA}`.",
        "",
        "| promise | limit | value | |",
        "|---|---|---|---|",
        *(f"| {' | '.join(line)} |" for line in verdicts(published)),
    ]
    for key, report in sorted(reports.items(), key=lambda item: _place(item[0])):
        objective, _, workload = key.partition(": ")
        note = "" if objective == "decode" else f", objective {objective}"
        lines += [
            "",
            f"**{workload}**{note} ({report.started_at[:10]}, "
            f"{report.repetitions} repetition{'s' if report.repetitions > 1 else ''})",
            "",
            "| figure | server | value | ratio |",
            "|---|---|---|---|",
            *map(_row_line, report.rows),
        ]
    return lines


def _place(key: str) -> tuple[bool, int, str]:
    """Order of the page: by objective, then as the workloads run."""
    order = (
        "single", "cold", "stall", "shared-prefix", "agents", "restart", "throughput", "load",
        "depth",
    )  # fmt: skip
    objective, _, workload = key.partition(": ")
    return objective != "decode", order.index(workload) if workload in order else 99, key


def _row_line(row: Row) -> str:
    if row.value is None:
        return f"| - | {row.server} | {row.failure} | |"
    what = f"{row.figure}, {row.at}" if row.at else row.figure
    cells = [_spread(row.value.median, row.value.minimum, row.value.maximum)]
    if row.ratio is None:
        cells.append("")
    else:
        cells.append(_spread(row.ratio.median, row.ratio.minimum, row.ratio.maximum))
    return f"| {what} | {row.server} | {' | '.join(cells)} |"


def _spread(median: float, minimum: float, maximum: float) -> str:
    """Three significant digits say more than the machine's drift does."""
    values = [f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}" for value in
              (median, minimum, maximum)]  # fmt: skip
    return values[0] if minimum == maximum else f"{values[0]} ({values[1]} to {values[2]})"


def print_verdicts(lines: Sequence[tuple[str, str, str, str]]) -> None:
    """A line for each promise."""
    for words, limit, value, verdict in lines:
        print(f"{verdict:12} {value:>8} {limit:>8}  {words}")
