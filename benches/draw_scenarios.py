"""Draws what the governor does in the scenarios of examples/ as docs/governor.svg.

The real policy and loop over described models in virtual time, as the golden files have it:

    python benches/draw_scenarios.py
"""

import sys
from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from golden.golden_scenarios import EXAMPLES
from support.described_runtime import Played, Sample, play

from brim.core.event import Event, EventKind
from brim.core.machine import Pressure
from brim.core.stance import PowerMode
from brim.machine.scenario import Scenario, load_scenario

FILE = Path(__file__).parent.parent / "docs" / "governor.svg"

MEMORY_SCENARIOS = {
    "browser-fills-memory": "16 GB laptop, a browser grows",
    "shared-studio": "192 GB Studio, four apps and a build",
}
POWER_SCENARIOS = {
    "fanless-heats-up": "fanless laptop under load",
    "laptop-leaves-power": "laptop on battery",
}

SHADES: dict[Pressure | PowerMode, str] = {
    Pressure.WARNING: "#fbe6b8",
    Pressure.CRITICAL: "#f4c2b8",
}
MODE_SHADES: dict[Pressure | PowerMode, str] = {
    PowerMode.BATTERY: "#dfeaf5",
    PowerMode.SAVING: "#fbe6b8",
    PowerMode.HOT: "#f4c2b8",
}
OTHERS, MODELS = "#c9c9c9", ("#33658a", "#59a08a", "#8d6a9f", "#c08552")

MARKS = {
    EventKind.KV_SHRUNK: "v",
    EventKind.KV_GROWN: "^",
    EventKind.MODEL_UNLOADED: "x",
    EventKind.MODEL_LOADED: "o",
}
"""How an event is marked on top of its model's bytes."""

MIN_LABELLED = 0.07
"""Of the width, that a band has to have for its name."""

GB = 1e9


def main() -> None:
    """Write the plot."""
    names = [*MEMORY_SCENARIOS, *POWER_SCENARIOS]
    with mpl.rc_context({"svg.hashsalt": "brim", "svg.fonttype": "none", "font.size": 8}):
        figure = Figure(figsize=(9.0, 9.5), layout="constrained")
        panes = figure.subplots(len(names), 1, height_ratios=(3, 3, 1.2, 1.2))
        for pane, name in zip(panes, names, strict=True):
            scenario = load_scenario(EXAMPLES / f"{name}.toml")
            played = play(scenario)
            if name in MEMORY_SCENARIOS:
                draw_memory(pane, scenario, played, MEMORY_SCENARIOS[name])
            else:
                draw_power(pane, played, POWER_SCENARIOS[name])
            pane.set_xlim(0, scenario.end_s)
        panes[-1].set_xlabel("seconds of the scenario")
        figure.savefig(FILE, metadata={"Date": None})


def draw_memory(pane: Axes, scenario: Scenario, played: Played, title: str) -> None:
    """Bytes of others and of each model, over bands of the level, with what was done."""
    samples = changes(played.samples)
    names = list(samples[0].model_bytes)
    times = [sample.at_s for sample in samples]
    others = [sample.others_bytes / GB for sample in samples]
    stacks = [[sample.model_bytes[name] / GB for sample in samples] for name in names]
    shade(pane, played, SHADES, "memory")
    pane.stackplot(
        times, others, *stacks, labels=["others", *names], colors=[OTHERS, *MODELS], step="post"
    )
    ram = scenario.machine.ram_bytes / GB
    pane.axhline(ram, color="black", linewidth=0.8)
    pane.set_ylim(0, 1.15 * ram)
    for event in played.events:
        if event.kind in MARKS and event.model in names:
            mark(pane, played, event, names[: names.index(event.model) + 1])
    pane.set_title(f"{title} (GB)", loc="left")
    pane.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=5, frameon=False, borderpad=0)


def mark(pane: Axes, played: Played, event: Event, names: list[str]) -> None:
    """One event, on top of its model just before it, or just after where it was not there."""
    second = min(int(event.at_unix_s), len(played.samples) - 1)
    is_new = event.kind is EventKind.MODEL_LOADED
    sample = played.samples[second if is_new else max(0, second - 1)]
    height = sample.others_bytes + sum(sample.model_bytes[name] for name in names)
    pane.plot(event.at_unix_s, height / GB, MARKS[event.kind], color="black", markersize=4)


def draw_power(pane: Axes, played: Played, title: str) -> None:
    """The share of time in which steps run, over bands of the mode."""
    times = [sample.at_s for sample in played.samples]
    paces = [100 * sample.stance.work.pace_fraction for sample in played.samples]
    shade(pane, played, MODE_SHADES, "power")
    pane.step(times, paces, where="post", color=MODELS[0])
    pane.set_ylim(0, 105)
    pane.set_title(f"{title}: share of time in which steps run, in %", loc="left")


def shade(
    pane: Axes, played: Played, shades: Mapping[Pressure | PowerMode, str], field: str
) -> None:
    """A band for each stretch of a level, with its name at the top where there is room."""
    length_s = played.samples[-1].at_s
    begun_s, level = 0.0, getattr(played.samples[0].stance, field)
    for sample in played.samples:
        is_last = sample is played.samples[-1]
        if getattr(sample.stance, field) is level and not is_last:
            continue
        if level in shades:
            pane.axvspan(begun_s, sample.at_s, color=shades[level], linewidth=0)
        if level in shades and sample.at_s - begun_s > MIN_LABELLED * length_s:
            pane.text(begun_s, 0.99, f" {level}", transform=pane.get_xaxis_transform(), va="top")
        begun_s, level = sample.at_s, getattr(sample.stance, field)


def changes(samples: list[Sample]) -> list[Sample]:
    """Those that differ from the one before, and the last."""
    kept = [samples[0]]
    for sample in samples[1:]:
        before = kept[-1]
        if (sample.others_bytes, sample.model_bytes) != (before.others_bytes, before.model_bytes):
            kept.append(sample)
    return [*kept, samples[-1]]


if __name__ == "__main__":
    main()
