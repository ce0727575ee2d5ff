"""`brim ps`: the models of the running server, what they really hold, and the account of memory."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from brim.ledger.entry import Statement
    from brim.ledger.history import ForecastError
    from brim.runtime.api import ModelStatus
    from brim.runtime.request_counts import RequestCounts
    from brim.worker.protocol import Stats

ANSWER_LIMIT_S = 5.0
"""For a server on this machine to answer from memory; longer means that it hangs."""


def ps(
    port: Annotated[
        int | None, typer.Option(help="Which server, where several run.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the models of the running server: state, bytes planned and held, and forecast errors."""
    from brim.cli.errors import say
    from brim.cli.neighbours import statement_of, statuses_of
    from brim.cli.output import print_json
    from brim.cli.state import one_server

    server = one_server(port)
    statuses = statuses_of(server, within_s=ANSWER_LIMIT_S)
    statement = statement_of(server, within_s=ANSWER_LIMIT_S)
    if as_json:
        print_json({"server": server, "models": statuses, "ledger": statement})
        return
    _print_models(statuses)
    for status in statuses:
        if reason := status.plan.reasons.get("engine"):
            typer.echo(f"{status.name} runs on {status.plan.engine}: {reason}")
    if statement is not None:
        _print_statement(statement)
    for status in statuses:
        if status.reason:
            say(f"{status.name}: {status.reason}")


def _print_models(statuses: "Sequence[ModelStatus]") -> None:
    from brim.cli.output import gib, print_table

    rows = [
        (
            status.name,
            status.state.value,
            status.plan.engine,
            status.plan.kv_type_k,
            str(status.plan.context_tokens),
            gib(status.plan.memory.total_bytes),
            "-" if status.resident_bytes is None else gib(status.resident_bytes),
            "-" if status.entry is None else gib(status.entry.kv_reserved_bytes),
            _error(status.forecast_errors),
            _cached(status.requests),
            _on_disk(status.worker_stats),
            _requests(status),
            "-" if status.pid is None else str(status.pid),
        )
        for status in statuses
    ]
    head = (
        "model", "state", "engine", "kv", "context", "planned", "resident", "kv in use", "error",
        "cached", "on disk", "running", "pid",
    )  # fmt: skip
    print_table(head, rows, right=frozenset(range(4, 13)))


def _cached(counts: "RequestCounts") -> str:
    """Part of all prompt tokens that did not have to be computed.

    Example:
        >>> from brim.runtime.request_counts import RequestCounts
        >>> _cached(RequestCounts(num_prompt_tokens=200, cached_tokens={"disk": 50, "memory": 100}))
        '75 %'
    """
    if not counts.num_prompt_tokens:
        return "-"
    return f"{100 * sum(counts.cached_tokens.values()) / counts.num_prompt_tokens:.0f} %"


def _on_disk(stats: "Stats | None") -> str:
    """Bytes of the model's prefixes on disk."""
    from brim.cli.output import gib

    store = None if stats is None else stats.prefix.store
    return "-" if store is None else gib(store.entry_bytes)


def _requests(status: "ModelStatus") -> str:
    """Requests in work, and those that wait for them."""
    return f"{status.num_running}" + (f" (+{status.num_waiting})" if status.num_waiting else "")


def _error(errors: "Sequence[ForecastError]") -> str:
    """The forecast's error in percent, above 0 where it was too high.

    Of the whole process once it has worked, else of the worst term that the backend reports.

    Example:
        >>> from brim.ledger.history import ForecastError
        >>> _error([ForecastError.of("kv_bytes", 103, 100)])
        '+3.0 % kv'
    """
    percents = {each.term: each.error_percent for each in errors if each.error_percent is not None}
    if not percents:
        return "-"
    term = max(percents, key=lambda name: (name == "total_bytes", abs(percents[name])))
    return f"{percents[term]:+.1f} % {term.removesuffix('_bytes')}"


def _print_statement(account: "Statement") -> None:
    """The account in one line: what is charged, of what, and what binds."""
    from brim.cli.output import gib

    simulated = " (simulated)" if account.is_simulated else ""
    typer.echo(
        f"memory{simulated}: {gib(account.charged_bytes)} granted of "
        f"{gib(account.comfortable_bytes)} comfortable ({account.comfortable_binding}) and "
        f"{gib(account.tight_bytes)} at most ({account.tight_binding}); others use "
        f"{gib(account.others_bytes)} of {gib(account.ram_bytes)}"
    )
