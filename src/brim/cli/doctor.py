"""`brim doctor`: what is wrong with this machine for models, why it matters, and what mends it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from brim.doctor.facts import ServedModel
    from brim.doctor.finding import Finding
    from brim.runtime.api import ModelStatus

ANSWER_LIMIT_S = 1.5
"""Below the limit of one question: a server that hangs is told by its own sentence."""

WIDTH = 96
INDENT = "    "


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    all_: Annotated[bool, typer.Option("--all", help="Show what is well in full, too.")] = False,
    state_dir: Annotated[
        str | None, typer.Option(help="The state directory of the server.", show_default=False)
    ] = None,
) -> int:
    """Check memory, power, models, engines, disk and crashes; ends with 1 on a problem."""
    import os

    from brim.cli.errors import DONE, FAILED
    from brim.cli.output import print_json
    from brim.cli.state import stale_files
    from brim.config.load import config_path, load_settings
    from brim.doctor.finding import Verdict
    from brim.doctor.gather import gather, questions
    from brim.doctor.registry import examine, worst_first

    settings = load_settings({"server.state_directory": ("--state-dir", state_dir)}).settings
    asked = questions(
        settings, served=_served, stale_servers=stale_files, config_file=config_path(os.environ)
    )
    findings = worst_first(examine(gather(asked)))
    if as_json:
        print_json(findings)
    else:
        _print(findings, shows_all=all_)
    return FAILED if any(f.verdict is Verdict.PROBLEM for f in findings) else DONE


def _served() -> "list[ServedModel]":
    """The models of all servers that run.

    Raises:
        BrimError: One of them does not answer.
    """
    from brim.cli.neighbours import statuses_of
    from brim.cli.state import live_servers

    return [
        _served_model(status)
        for server in live_servers()
        for status in statuses_of(server, within_s=ANSWER_LIMIT_S)
    ]


def _served_model(status: "ModelStatus") -> "ServedModel":
    from brim.doctor.facts import ServedModel
    from brim.runtime.api import ModelState

    counts = status.requests
    answered = sum(n for how, n in counts.outcomes.items() if how in ("stop", "length"))
    return ServedModel(
        plan=status.plan,
        num_answers=answered,
        num_prompt_tokens=counts.num_prompt_tokens,
        num_completion_tokens=counts.num_completion_tokens,
        is_quarantined=status.state is ModelState.QUARANTINED,
        reason=status.reason,
        num_deaths=status.num_deaths,
    )


def _print(findings: "Sequence[Finding]", *, shows_all: bool) -> None:
    """Problems first, then the rest by group; what is well takes a line."""
    from brim.doctor.finding import Verdict

    calls = [f for f in findings if f.verdict is not Verdict.OK]
    for finding in calls:
        _print_finding(finding)
    well = [f for f in findings if f.verdict is Verdict.OK]
    if shows_all:
        for finding in well:
            _print_finding(finding)
    else:
        for group in dict.fromkeys(finding.group for finding in well):
            for finding in (f for f in well if f.group == group):
                typer.echo(f"ok       {group}/{finding.check}: {_plain(finding.found)}")
    typer.echo(_summary(findings))


def _print_finding(finding: "Finding") -> None:
    head = f"{finding.verdict.value:<8} {finding.group}/{finding.check}: {_plain(finding.found)}"
    typer.echo(_wrapped(head, INDENT))
    typer.echo(_wrapped(f"{INDENT}why: {finding.why}", INDENT + "     "))
    if finding.mend:
        # Not wrapped: it is there to be copied.
        typer.echo(f"{INDENT}mend: {_plain(finding.mend)}")


def _wrapped(text: str, indent: str) -> str:
    """Lines of WIDTH; only a longer path sticks out, which could not be copied once broken."""
    import textwrap

    return textwrap.fill(
        text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _summary(findings: "Sequence[Finding]") -> str:
    """How many of each.

    Example:
        >>> _summary([])
        '0 problems, 0 warnings, 0 notes, 0 well'
    """
    from brim.doctor.finding import Verdict
    from brim.doctor.words import count

    def number(verdict: Verdict) -> int:
        return sum(finding.verdict is verdict for finding in findings)

    counted = [
        count(number(Verdict.PROBLEM), "problem"),
        count(number(Verdict.WARNING), "warning"),
        count(number(Verdict.NOTE), "note"),
    ]
    return f"{', '.join(counted)}, {number(Verdict.OK)} well"


def _plain(text: str) -> str:
    """Text on one line, without terminal codes that paths and process names may hold."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
