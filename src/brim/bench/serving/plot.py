"""Draws a report: for each workload a pane, for each figure a bar a server with its range."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from brim.bench.serving.report import Report, Row
from brim.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANE_INCHES = (9.0, 0.28)
"""Width of the figure, and height of a bar with its label."""


def check_plot(path: Path) -> None:
    """Refuse before a long run what could not be drawn after it.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written as it is named.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as exc:
        raise ConfigError(
            "--plot needs matplotlib; install it beside brim, or leave --plot out"
        ) from exc
    if not path.parent.is_dir() or path.is_dir():
        raise ConfigError(
            f"cannot write the plot to {path}: name a file in a directory that exists"
        )
    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in kinds:
        raise ConfigError(
            f"cannot write the plot to {path}: name it *.svg, or one of {', '.join(sorted(kinds))}"
        )


def draw(report: Report, path: Path) -> None:
    """Write the report's medians and ranges as SVG, or whatever the file's name asks for.

    Raises:
        ConfigError: There is nothing to draw, or `check_plot` refuses the file.
    """
    check_plot(path)
    import matplotlib as mpl
    from matplotlib.figure import Figure

    shown = {
        workload: [row for row in report.rows if row.workload == workload and _is_drawn(row)]
        for workload in dict.fromkeys(row.workload for row in report.rows)
    }
    shown = {workload: rows for workload, rows in shown.items() if rows}
    if not shown:
        raise ConfigError("there is nothing to plot: no server gave a figure")
    heights = [len(rows) + 2 for rows in shown.values()]
    # The same figures give the same file, so that a diff means a change.
    with mpl.rc_context({"svg.hashsalt": "brim", "svg.fonttype": "none", "font.size": 8}):
        figure = Figure(figsize=(PANE_INCHES[0], PANE_INCHES[1] * sum(heights) + 1))
        panes = figure.subplots(len(shown), 1, squeeze=False, height_ratios=heights)
        for pane, (workload, rows) in zip(panes[:, 0], shown.items(), strict=True):
            _draw_pane(pane, workload, rows, [server.name for server in report.servers])
        figure.tight_layout()
        try:
            figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        except (OSError, ValueError) as exc:
            raise ConfigError(f"cannot write the plot to {path}: {exc}") from exc


def _is_drawn(row: Row) -> bool:
    """Figures, not counts."""
    return row.value is not None and not row.figure.startswith("num_")


def _draw_pane(pane: "Axes", workload: str, rows: Sequence[Row], servers: Sequence[str]) -> None:
    """Bars relative to the figure's largest value: figures of one pane have several units."""
    largest = {
        key: max(r.value.maximum for r in rows if r.value and (r.at, r.figure) == key) or 1.0
        for key in {(row.at, row.figure) for row in rows}
    }
    for place, row in enumerate(reversed(rows)):
        assert row.value is not None
        value, scale = row.value, abs(largest[row.at, row.figure])
        pane.barh(
            place, value.median / scale, color=f"C{servers.index(row.server) % 10}", height=0.8
        )
        pane.plot([value.minimum / scale, value.maximum / scale], [place, place], c="black", lw=1)
        pane.text(max(value.maximum / scale, 0.0) + 0.01, place, f"{value.median:.4g}", va="center")
    names = [f"{row.figure} {row.at} {row.server}".replace("  ", " ") for row in reversed(rows)]
    pane.set_yticks(range(len(names)), names, fontsize=7)
    pane.set(title=workload, xlim=(0, 1.25), xticks=[])
