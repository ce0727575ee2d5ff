"""Samples to rows: each figure's median and spread, and its ratio pair by pair to the reference."""

from collections.abc import Sequence

import msgspec

from brim.bench.serving.session import Asked, Figure
from brim.bench.serving.sizes import Sizes
from brim.bench.stats import Summary, pairwise_ratios, summarise


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One turn: what one server did at one workload in one repetition."""

    workload: str
    server: str
    repetition: int
    duration_s: float
    figures: tuple[Figure, ...] = ()
    failure: str | None = None
    """Why there are no figures, in a sentence."""
    was_skipped: bool = False
    """Whether it was not tried, rather than failed."""
    others_busy_fraction: float = 0.0
    """Share of all processors that other programs used meanwhile."""
    asked: tuple[Asked, ...] = ()


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One figure of one server over all repetitions, or why it has none."""

    workload: str
    server: str
    figure: str = ""
    at: str = ""
    value: Summary | None = None
    ratio: Summary | None = None
    """To the reference, pair by pair; None for the reference itself, and where a pair lacks one."""
    failure: str | None = None


class ServerNote(msgspec.Struct, frozen=True, kw_only=True):
    """One server of the comparison, as it was run."""

    name: str
    command: str | None
    """None: it ran already."""
    model: str | None
    takes_ignore_eos: bool


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that was measured, and the rows made of it."""

    machine: str
    started_at: str
    """ISO 8601, UTC."""
    seed: int
    """With which the same texts are made again."""
    reference: str
    servers: tuple[ServerNote, ...]
    sizes: Sizes
    repetitions: int
    was_interrupted: bool
    complaints: tuple[str, ...]
    """What a reader should know before quoting a figure, a sentence each."""
    samples: tuple[Sample, ...]
    rows: tuple[Row, ...]

    def median(self, workload: str, server: str, figure: str, at: str = "") -> float | None:
        """One figure's median; None where there is none."""
        row = self.row(workload, server, figure, at)
        return row.value.median if row and row.value else None

    def ratio(self, workload: str, server: str, figure: str, at: str = "") -> float | None:
        """One figure's median ratio to the reference; None where there is none."""
        row = self.row(workload, server, figure, at)
        return row.ratio.median if row and row.ratio else None

    def row(self, workload: str, server: str, figure: str, at: str = "") -> Row | None:
        """One row, or None."""
        wanted = (workload, server, figure, at)
        return next(
            (r for r in self.rows if (r.workload, r.server, r.figure, r.at) == wanted), None
        )


def rows(samples: Sequence[Sample], reference: str) -> list[Row]:
    """One row for each workload, figure and server, in the order in which they were measured."""
    found: list[Row] = []
    # The first turns of all are in the order in which the servers were named.
    servers = sorted(
        dict.fromkeys(sample.server for sample in samples), key=lambda name: name != reference
    )
    for workload in dict.fromkeys(sample.workload for sample in samples):
        mine = [sample for sample in samples if sample.workload == workload]
        keys = dict.fromkeys(
            (figure.at, figure.name) for sample in mine for figure in sample.figures
        )
        for at, name in keys:
            found += [
                row
                for server in servers
                if (row := _row(mine, server, reference, name, at)) is not None
            ]
        found += [
            Row(workload=workload, server=server, failure=failure)
            for server in servers
            if (failure := _failure(mine, server)) is not None
        ]
    return found


def _row(samples: Sequence[Sample], server: str, reference: str, name: str, at: str) -> Row | None:
    values, others = _values(samples, server, name, at), _values(samples, reference, name, at)
    if not values:
        return None
    pairs = [
        (value, others[repetition])
        for repetition, value in values.items()
        if others.get(repetition, 0.0) > 0
    ]
    ratios = pairwise_ratios(*zip(*pairs, strict=True)) if pairs and server != reference else []
    return Row(
        workload=samples[0].workload,
        server=server,
        figure=name,
        at=at,
        value=summarise(list(values.values())),
        ratio=summarise(ratios) if ratios else None,
    )


def _values(samples: Sequence[Sample], server: str, name: str, at: str) -> dict[int, float]:
    """Repetition -> value."""
    return {
        sample.repetition: figure.value
        for sample in samples
        if sample.server == server
        for figure in sample.figures
        if (figure.name, figure.at) == (name, at)
    }


def _failure(samples: Sequence[Sample], server: str) -> str | None:
    """Why some of a server's turns have no figures: the first reason, and how many they are."""
    mine = [sample for sample in samples if sample.server == server]
    failed = [sample for sample in mine if sample.failure is not None]
    if not failed:
        return None
    what = "skipped" if failed[0].was_skipped else "failed"
    times = f" ({len(failed)} of {len(mine)} times)" if len(mine) > 1 else ""
    return f"{what}{times}: {failed[0].failure}"
