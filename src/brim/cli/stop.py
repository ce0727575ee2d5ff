"""`brim stop`: end the running server, once its answers are finished."""

from typing import Annotated

import typer

POLL_S = 0.05
KILL_MARGIN_S = 15.0
"""After the drain limit, for workers to free their memory and the server to exit."""


def stop(
    port: Annotated[
        int | None, typer.Option(help="Which server, where several run.", show_default=False)
    ] = None,
) -> None:
    """Stop the running server: answers in progress finish, up to the drain limit."""
    import os
    import signal
    import time

    from brim.cli.errors import say
    from brim.cli.state import one_server
    from brim.errors import BrimError

    server = one_server(port)
    limit_s = server.drain_limit_s + KILL_MARGIN_S
    try:
        os.kill(server.pid, signal.SIGTERM)
    except ProcessLookupError:
        say("the server had just ended")
        return
    deadline = time.monotonic() + limit_s
    while server.is_running():
        if time.monotonic() > deadline:
            raise BrimError(
                f"the server (pid {server.pid}) has not ended after {limit_s:.0f} s; "
                f"end it with: kill -9 {server.pid}"
            )
        time.sleep(POLL_S)
    say(f"the server on {server.url} has stopped")
