"""`brim events`: what servers did about memory, heat, power and apps, and why.

Read from the state directory, so that it works while a server runs and after one has crashed.
`--follow` goes on with what happens, over a server's restart (`event_follow`).
"""

import functools
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pathlib import Path

    from brim.core.event import Event, EventKind

NUM_SHOWN = 50
"""About a screen."""

HEAD = ("when", "what", "model", "before -> after", "s", "why")
RIGHT = frozenset({4})

WIDTHS = (19, 16, 16, 22, 6, 0)
"""While following, when later cells are not known yet; wider ones push the rest to the right."""


def events(
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with what happens from now on.")
    ] = False,
    limit: Annotated[
        int, typer.Option(min=0, metavar="N", help="Show the newest N at most; 0 shows none.")
    ] = NUM_SHOWN,
    kind: Annotated[
        list[str] | None,
        typer.Option(metavar="KIND", help="Only of this kind; may be given again."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Only of this model.", show_default=False)
    ] = None,
    app: Annotated[
        str | None, typer.Option(metavar="NAME", help="Only of this app.", show_default=False)
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Which server, where several run.", show_default=False)
    ] = None,
    state_dir: Annotated[
        str | None,
        typer.Option(help="The state directory of a server that has ended.", show_default=False),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON; while following, a line each.")
    ] = False,
) -> None:
    """List what servers did about memory, heat, power and apps, oldest first."""
    from brim.cli.errors import say
    from brim.cli.output import print_json, print_table
    from brim.telemetry.event_store import FILE_NAME, EventStore

    kinds = [_kind(text) for text in kind or ()]
    directory = _directory(port, state_dir)
    read = functools.partial(
        EventStore(directory / FILE_NAME).read, kinds=kinds, model=model, app=app
    )
    if follow:
        from brim.cli.event_follow import Follower, Wanted

        wanted = Wanted(kinds=kinds, model=model, app=app)
        if not as_json:
            _echo(_line(HEAD))
        show = functools.partial(_show, as_json=as_json)
        Follower(directory, read, wanted, show, wait=_wait).run(limit)
        return
    found = [stored.event for stored in read(limit)]
    if as_json:
        print_json(found)
    elif found:
        print_table(HEAD, [_row(event) for event in found], right=RIGHT)
    else:
        is_any = not (kinds or model or app or limit == 0)
        say(f"{directory} keeps no event{' yet' if is_any else ' that is asked for'}")


def _show(event: "Event", *, as_json: bool) -> None:
    _echo(_json(event) if as_json else _line(_row(event)))


def _directory(port: int | None, state_dir: str | None) -> "Path":
    """The state directory that was named, or of the server that runs, or of the settings."""
    from pathlib import Path

    from brim.cli.state import one_server, running_servers
    from brim.config.load import load_settings
    from brim.config.places import state_path

    if port is not None and state_dir is not None:
        raise typer.BadParameter("--port and --state-dir both name a server; leave one out")
    loaded = load_settings({"server.state_directory": ("--state-dir", state_dir)})
    is_named = loaded.origins["server.state_directory"] != "default"
    if port is None and (is_named or not running_servers()):
        return state_path(loaded.settings)
    server = one_server(port)
    return Path(server.state_directory) if server.state_directory else state_path(loaded.settings)


def _kind(text: str) -> "EventKind":
    """The kind that a word names, however its words are joined.

    Example:
        >>> _kind("model-unloaded").value
        'model unloaded'
    """
    from brim.config.toml_file import hint
    from brim.core.event import EventKind

    name = text.lower().replace("-", " ").replace("_", " ")
    try:
        return EventKind(name)
    except ValueError:
        known = [kind.value for kind in EventKind]
        raise typer.BadParameter(f"there is no kind '{text}'; {hint(name, known)}") from None


def _row(event: "Event") -> tuple[str, ...]:
    from datetime import datetime

    when = datetime.fromtimestamp(event.at_unix_s).astimezone()
    subjects = [event.model, f"app {event.app}" if event.app else ""]
    return (
        when.strftime("%Y-%m-%d %H:%M:%S"),
        event.kind.value + (" (simulated)" if event.is_simulated else ""),
        ", ".join(filter(None, subjects)) or "-",
        _change(event),
        "-" if event.took_s is None else f"{event.took_s:.2f}",
        event.cause or "-",
    )


def _change(event: "Event") -> str:
    """Bytes or watts before and after, as far as they were measured.

    Example:
        >>> from brim.core.event import Event, EventKind
        >>> _change(Event(at_unix_s=0, kind=EventKind.KV_SHRUNK, before_bytes=3 << 30))
        '3.00 GiB -> ?'
    """
    from brim.cli.output import gib

    def text(before: str | None, after: str | None) -> str:
        return "" if before is None and after is None else f"{before or '?'} -> {after or '?'}"

    bytes_ = [None if n is None else gib(n) for n in (event.before_bytes, event.after_bytes)]
    watts = [None if n is None else f"{n:.1f} W" for n in (event.before_watts, event.after_watts)]
    return ", ".join(filter(None, (text(*bytes_), text(*watts)))) or "-"


def _json(event: "Event") -> str:
    import msgspec

    return msgspec.json.encode(event).decode()


def _line(cells: "Sequence[str]") -> str:
    """Cells below each other as far as their widths allow."""
    from brim.cli.output import on_one_line

    padded = (on_one_line(cell).ljust(width) for cell, width in zip(cells, WIDTHS, strict=True))
    return "  ".join(padded).rstrip()


def _wait(seconds: float) -> None:
    import time

    time.sleep(seconds)


def _echo(text: str) -> None:
    """Print at once, also into a pipe."""
    typer.echo(text)
    sys.stdout.flush()
