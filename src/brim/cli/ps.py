"""`brim ps`: the models of the running server, and what they really hold."""

from typing import Annotated

import typer

ANSWER_LIMIT_S = 5.0
"""For a server on this machine to answer from memory; longer means that it hangs."""


def ps(
    port: Annotated[
        int | None, typer.Option(help="Which server, where several run.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the models of the running server: state, bytes planned and bytes held."""
    from brim.cli.errors import say
    from brim.cli.neighbours import statuses_of
    from brim.cli.output import gib, print_json, print_table
    from brim.cli.state import one_server

    server = one_server(port)
    statuses = statuses_of(server, within_s=ANSWER_LIMIT_S)
    if as_json:
        print_json({"server": server, "models": statuses})
        return
    rows = [
        (
            status.name,
            status.state.value,
            status.plan.engine,
            status.plan.kv_type_k,
            str(status.plan.context_tokens),
            gib(status.plan.memory.total_bytes),
            "-" if status.resident_bytes is None else gib(status.resident_bytes),
            str(status.num_running),
            "-" if status.pid is None else str(status.pid),
        )
        for status in statuses
    ]
    head = (
        "model", "state", "engine", "kv", "context", "planned", "resident", "running", "pid",
    )  # fmt: skip
    print_table(head, rows, right=frozenset(range(4, 9)))
    for status in statuses:
        if status.reason:
            say(f"{status.name}: {status.reason}")
