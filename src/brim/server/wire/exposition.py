"""Prometheus' text format, version 0.0.4: families of samples as lines.

Own code because the counters live in workers and in the gateway's hosts: a client library's
registry would be a second copy of each, kept in step by hand.
"""

from collections.abc import Mapping
from typing import Literal

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Kind = Literal["counter", "gauge"]


class Exposition:
    """Collects samples by family, in the order in which families first came.

    Example:
        >>> page = Exposition()
        >>> page.add("brim_tokens_total", "counter", "Tokens.", 3, {"model": "toy"})
        >>> print(page.text(), end="")
        # HELP brim_tokens_total Tokens.
        # TYPE brim_tokens_total counter
        brim_tokens_total{model="toy"} 3
    """

    def __init__(self) -> None:
        self._families: dict[str, list[str]] = {}

    def add(
        self,
        name: str,
        kind: Kind,
        meaning: str,
        value: float | None,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        """Add one sample; None adds none, where a figure is not known.

        Args:
            name: Of the family; counters end with `_total`.
            kind: What the value does over time.
            meaning: The family's line of help.
            value: The figure, in the unit that the name has.
            labels: What tells the sample from others of its family.
        """
        if value is None:
            return
        head = [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]
        lines = self._families.setdefault(name, head)
        pairs = ",".join(f'{key}="{_escaped(text)}"' for key, text in (labels or {}).items())
        lines.append(f"{name}{{{pairs}}} {value}" if pairs else f"{name} {value}")

    def add_all(
        self,
        name: str,
        kind: Kind,
        meaning: str,
        values: Mapping[str, float],
        labels: Mapping[str, str],
        by: str,
    ) -> None:
        """Add one sample for each of `values`, told apart by the label `by`."""
        for key, value in values.items():
            self.add(name, kind, meaning, value, {**labels, by: key})

    def text(self) -> str:
        """The page."""
        return "".join(f"{line}\n" for lines in self._families.values() for line in lines)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
