"""The event log of every scenario of examples/ as a file: policy and loop in virtual time.

Run it (`make goldens`) after a change that is meant to move what the governor does; the diff is the
review.
"""

import json
from pathlib import Path

from support.described_runtime import as_line, play

from brim.machine.scenario import load_scenario

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "examples" / "scenarios"
LOGS = HERE / "scenarios"


def scenarios() -> list[str]:
    """The scenarios by name."""
    return sorted(path.stem for path in EXAMPLES.glob("*.toml"))


def log_of(name: str) -> str:
    """What the governor does in a scenario: one line of JSON for each event."""
    played = play(load_scenario(EXAMPLES / f"{name}.toml"))
    return "".join(json.dumps(as_line(event)) + "\n" for event in played.events)


def main() -> None:
    """Write all of them."""
    LOGS.mkdir(exist_ok=True)
    for name in scenarios():
        (LOGS / f"{name}.jsonl").write_text(log_of(name))


if __name__ == "__main__":
    main()
