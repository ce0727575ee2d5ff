"""`brim ps`: the models of the running server, what they really hold, and the account of memory."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from brim.cli.state import ServerState
    from brim.core.stance import Stance
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
    from brim.cli.neighbours import stance_of, statement_of, statuses_of
    from brim.cli.output import print_json
    from brim.cli.state import one_server

    server = one_server(port)
    statuses = statuses_of(server, within_s=ANSWER_LIMIT_S)
    statement = statement_of(server, within_s=ANSWER_LIMIT_S)
    stance = stance_of(server, within_s=ANSWER_LIMIT_S)
    if as_json:
        listed = {"models": statuses, "ledger": statement, "governor": stance}
        print_json({"server": _shown(server), **listed})
        return
    _print_models(statuses)
    for status in statuses:
        if reason := status.plan.reasons.get("engine"):
            typer.echo(f"{status.name} runs on {status.plan.engine}: {reason}")
    for target, draft in sorted({status.pair for status in statuses if status.pair}):
        typer.echo(f"{target} and {draft} are a pair: loaded and unloaded together")
    if statement is not None:
        _print_statement(statement)
    if stance.reason:
        typer.echo(f"governor: {stance.reason}{_forbidden(stance)}")
    for status in statuses:
        if status.reason:
            say(f"{status.name}: {status.reason}")


def _forbidden(stance: "Stance") -> str:
    """What is not allowed at the moment, in words.

    Example:
        >>> from brim.core.stance import Stance, WorkLimits
        >>> _forbidden(Stance(loads=False, work=WorkLimits(runs_background=False)))
        '; no model is loaded, background work waits'
    """
    words = []
    if not stance.admits:
        words.append("nothing new is admitted")
    if not stance.loads:
        words.append("no model is loaded")
    if not stance.work.runs_background:
        words.append("background work waits")
    if stance.work.pace_fraction < 1:
        words.append(f"steps run {100 * stance.work.pace_fraction:.0f} % of the time")
    return "; " + ", ".join(words) if words else ""


def _shown(server: "ServerState") -> dict[str, object]:
    """What may be pasted into a bug report: all but the token, which opens the server."""
    import msgspec

    return {
        name: value
        for name, value in msgspec.to_builtins(server).items()
        if name != "operator_token"
    }


def _print_models(statuses: "Sequence[ModelStatus]") -> None:
    from brim.cli.output import gib, print_table

    rows = [
        (
            status.name,
            _state(status),
            status.plan.engine,
            status.plan.kv_type_k,
            str(status.plan.context_tokens),
            gib(status.plan.memory.total_bytes),
            "-" if status.entry is None else gib(status.entry.charged_bytes),
            "-" if status.resident_bytes is None else gib(status.resident_bytes),
            _kv_tokens(status),
            _requests(status),
            "-" if status.idle_s is None else _duration(status.idle_s),
            _leaves(status),
            _error(status.forecast_errors),
            _cached(status.requests),
            _on_disk(status.worker_stats),
            "-" if status.pid is None else str(status.pid),
        )
        for status in statuses
    ]
    head = (
        "model", "state", "engine", "kv", "context", "planned", "granted", "measured",
        "kv tokens used", "running", "idle", "leaves", "error", "cached", "on disk", "pid",
    )  # fmt: skip
    print_table(head, rows, right=frozenset({*range(4, 11), *range(12, 16)}))


def _state(status: "ModelStatus") -> str:
    """How far a load is, where one is under way."""
    if status.load_progress is None:
        return status.state.value
    percent = f"{status.state.value} {100 * status.load_progress:.0f} %"
    eta_s = status.load_eta_s
    return percent if eta_s is None else f"{percent}, {_duration(eta_s)} left"


def _kv_tokens(status: "ModelStatus") -> str:
    """Cells of the pool in use, of how many, and of how many by the plan where that is more."""
    if not status.kv_pool_tokens:
        return "-"
    words = f"{status.kv_used_tokens} of {status.kv_pool_tokens}"
    is_smaller = status.kv_pool_tokens < status.plan.kv_tokens
    return f"{words} ({status.plan.kv_tokens} planned)" if is_smaller else words


def _leaves(status: "ModelStatus") -> str:
    """When idleness takes a model out of memory, or why it stays."""
    if status.leaves_in_s is not None:
        return f"in {_duration(status.leaves_in_s)}"
    return f"stays: {status.stays}" if status.stays else "-"


def _duration(seconds: float) -> str:
    """Seconds for a column.

    Example:
        >>> _duration(42.4), _duration(150), _duration(7200)
        ('42 s', '2.5 min', '2.0 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


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
    """Requests in work, those that wait for them, and those that wait for the model."""
    waiting = [f"+{status.num_waiting}"] if status.num_waiting else []
    if status.num_waiting_load:
        waiting.append(f"{status.num_waiting_load} for its load")
    return f"{status.num_running}" + (f" ({', '.join(waiting)})" if waiting else "")


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
