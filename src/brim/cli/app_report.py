"""Prints apps, keys and usage, as tables and as JSON."""

from collections.abc import Sequence
from datetime import datetime

import msgspec
import typer

from brim.apps.day import in_words
from brim.apps.registry import Entry
from brim.apps.usage import UsageLine
from brim.cli.app_usage import Standing
from brim.cli.errors import say
from brim.cli.output import print_json, print_table
from brim.core.app import App


def print_added(
    name: str, key: str, base_url: str, warnings: Sequence[str], *, as_json: bool
) -> None:
    """The key of a new app, this once."""
    if as_json:
        print_json({"name": name, "key": key, "base_url": base_url, "warnings": warnings})
        return
    _say_all(warnings)
    typer.echo(f"app '{name}' was added; this is its key, which is not shown again:")
    typer.echo(f"OPENAI_BASE_URL={base_url} OPENAI_API_KEY={key}")


def print_rotated(name: str, key: str, base_url: str, *, as_json: bool) -> None:
    """The new key of an app, this once."""
    if as_json:
        print_json({"name": name, "key": key, "base_url": base_url})
        return
    typer.echo(f"app '{name}' has a new key, which is not shown again; the old one is refused:")
    typer.echo(f"OPENAI_BASE_URL={base_url} OPENAI_API_KEY={key}")


def print_replaced(app: App, warnings: Sequence[str], *, as_json: bool) -> None:
    """That an app has a new manifest."""
    if as_json:
        print_json({"name": app.name, "key": None, "warnings": warnings})
        return
    _say_all(warnings)
    typer.echo(f"app '{app.name}' has its new manifest; its key and usage stay")


def print_checked(app: App, warnings: Sequence[str], *, as_json: bool) -> None:
    """A manifest that can be added, and what the machine lacks for it."""
    if as_json:
        print_json({"app": app, "warnings": warnings})
        return
    _say_all(warnings)
    typer.echo(f"the manifest of '{app.name}' is in order: {_grants(app)}")


def print_list(entries: Sequence[Entry], standings: Sequence[Standing], *, as_json: bool) -> None:
    """All apps, a line each."""
    if as_json:
        print_json(
            [
                {**_fields(entry), "today": standing}
                for entry, standing in zip(entries, standings, strict=True)
            ]
        )
        return
    if not entries:
        say("no app is known yet; add one with: brim apps add FILE")
        return
    rows = [
        (
            entry.app.name,
            entry.app.priority.value,
            ", ".join(entry.app.models) or "all",
            str(standing.num_requests),
            _share(standing.used_tokens, standing.budget_tokens, "{:,.0f}"),
            _date(entry.added_unix_s),
            f"{entry.key_hint}...",
        )
        for entry, standing in zip(entries, standings, strict=True)
    ]
    head = ("app", "priority", "models", "requests today", "tokens today", "added", "key")
    print_table(head, rows, right=frozenset({3, 4}))


def print_entry(entry: Entry, *, as_json: bool) -> None:
    """One app, and its manifest as it was added."""
    if as_json:
        print_json({**_fields(entry), "manifest": entry.manifest})
        return
    typer.echo(f"app '{entry.app.name}': {_grants(entry.app)}")
    typer.echo(
        f"added {_date(entry.added_unix_s)}, changed {_date(entry.changed_unix_s)}; its key begins "
        f"with {entry.key_hint}"
    )
    typer.echo("")
    for line in entry.manifest.splitlines():
        # A manifest is someone else's text; what it holds must not drive the terminal.
        typer.echo("".join(c if c.isprintable() or c == "\t" else "?" for c in line))


def print_usage(
    standings: Sequence[Standing], lines: Sequence[UsageLine], *, as_json: bool
) -> None:
    """Budgets of today, then what was used by day and model."""
    if as_json:
        days = [
            {"app": line.app, "day": line.day, "model": line.model,
             **msgspec.structs.asdict(line.spent), "num_tokens": line.spent.num_tokens}
            for line in lines
        ]  # fmt: skip
        print_json({"today": standings, "days": days})
        return
    _print_today(standings)
    if lines:
        typer.echo("")
        _print_days(lines)


def _print_today(standings: Sequence[Standing]) -> None:
    rows = [
        (
            standing.name,
            str(standing.num_requests),
            str(standing.num_refused),
            _share(standing.used_tokens, standing.budget_tokens, "{:,.0f}"),
            f"{standing.reserved_tokens:,}" if standing.reserved_tokens else "-",
            _share(standing.used_energy_j / 3600, _over(standing.budget_energy_j, 3600), "{:,.2f}"),
            _share(
                standing.ssd_written_bytes / 1e9,
                _over(standing.budget_ssd_write_bytes, 1e9),
                "{:,.2f}",
            ),
        )
        for standing in standings
    ]
    head = ("app", "requests", "refused", "tokens", "promised", "energy, Wh", "SSD writes, GB")
    print_table(head, rows, right=frozenset(range(1, 7)))
    if standings:
        wait = in_words(standings[0].renews_in_s)
        typer.echo(f"today is {standings[0].day} in UTC; budgets renew in {wait}")


def _print_days(lines: Sequence[UsageLine]) -> None:
    rows = [
        (
            line.day,
            line.app,
            line.model or "-",
            f"{line.spent.num_requests:,}",
            f"{line.spent.num_refused:,}",
            f"{line.spent.num_prompt_tokens:,}",
            f"{line.spent.num_cached_tokens:,}",
            f"{line.spent.num_completion_tokens:,}",
            f"{line.spent.num_lost_tokens:,}",
            f"{line.spent.energy_j / 3600:,.2f}",
            f"{line.spent.ssd_write_bytes / 1e9:,.2f}",
        )
        for line in lines
    ]
    head = (
        "day", "app", "model", "requests", "refused", "prompt", "cached", "answers", "lost",
        "Wh", "GB written",
    )  # fmt: skip
    print_table(head, rows, right=frozenset(range(3, 11)))


def _share(used: float, budget: float | None, form: str) -> str:
    """What was used of a budget, with the percentage.

    Example:
        >>> _share(1500, 6000, "{:,.0f}"), _share(1500, None, "{:,.0f}")
        ('1,500 of 6,000, 25 %', '1,500')
    """
    figure = form.format(used)
    if budget is None:
        return figure
    percent = 100.0 if budget == 0 else 100 * used / budget
    return f"{figure} of {form.format(budget)}, {percent:.0f} %"


def _over(figure: float | None, divisor: float) -> float | None:
    return None if figure is None else figure / divisor


def _grants(app: App) -> str:
    """What an app may do, in one line."""
    budgets, limits = app.budgets, app.limits
    parts = [
        f"{app.priority.value}",
        f"models {', '.join(app.models)}" if app.models else "all models",
        *(f"'{pair.draft}' drafts for '{pair.target}'" for pair in app.pairs),
    ]
    named = (
        (app.max_context_tokens, "context of {:,} tokens"),
        (app.overflow and app.overflow.value, "overflow {}"),
        (app.kv_quality and app.kv_quality.value, "KV of {} or better"),
        (_over(app.required_bytes, 1e9), "requires {:.1f} GB"),
        (app.keep_loaded or None, "kept loaded"),
        (app.accepts_draft or None, "accepts drafts' answers"),
        (budgets.tokens, "{:,} tokens a day"),
        (_over(budgets.energy_j, 3600), "{:,.2f} Wh a day"),
        (_over(budgets.ssd_write_bytes, 1e9), "{:,.2f} GB of SSD writes a day"),
        (limits.requests_per_minute, "{:,} requests a minute"),
        (limits.max_concurrent, "{:,} at once"),
        (limits.memory_share if limits.memory_share < 1 else None, "{:.0%} of the KV pool"),
    )
    parts += [form.format(value) for value, form in named if value is not None]
    return "; ".join(parts)


def _fields(entry: Entry) -> dict[str, object]:
    return {
        "app": entry.app,
        "key_hint": entry.key_hint,
        "added_unix_s": entry.added_unix_s,
        "changed_unix_s": entry.changed_unix_s,
    }


def _date(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s).astimezone().strftime("%Y-%m-%d %H:%M")


def _say_all(warnings: Sequence[str]) -> None:
    for warning in warnings:
        say(warning)
