"""`brim ps`: the models of the running server, and what they really hold."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from brim.cli.state import ServerState
    from brim.runtime.api import ModelStatus

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
    from brim.cli.output import gib, print_json, print_table
    from brim.cli.state import one_server

    server = one_server(port)
    statuses = _statuses(server)
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


def _statuses(server: "ServerState") -> "list[ModelStatus]":
    """What the server says of its models.

    Raises:
        BrimError: It does not answer, or not as a server of this version does.
    """
    import http.client
    import urllib.parse

    import msgspec

    from brim.errors import BrimError
    from brim.runtime.api import ModelStatus

    # Not urllib's opener, which would send a request to this machine through a proxy.
    address = urllib.parse.urlsplit(server.url)
    connection = http.client.HTTPConnection(
        address.hostname or "", address.port, timeout=ANSWER_LIMIT_S
    )
    try:
        connection.request("GET", "/brim/ps")
        response = connection.getresponse()
        body = response.read()
        if response.status != 200:
            raise BrimError(f"the server on {server.url} answers {response.status}; restart it")
        return msgspec.json.decode(body, type=list[ModelStatus])
    except (OSError, http.client.HTTPException, msgspec.DecodeError) as exc:
        raise BrimError(
            f"the server on {server.url} (pid {server.pid}) gives no answer ({exc}); "
            "try again, or stop it with: brim stop"
        ) from exc
    finally:
        connection.close()
