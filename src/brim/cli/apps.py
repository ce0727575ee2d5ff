"""`brim apps`: who may use this machine's models, with which key and budget, and what they used."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from brim.apps.registry import Registry

app = typer.Typer(help="Add apps, and look at what they use.", no_args_is_help=True)

MAX_DAYS = 400
"""As long as usage is kept."""

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="The app's name.", show_default=False)]
ManifestFile = Annotated[
    Path, typer.Argument(metavar="FILE", help="The app's manifest, TOML.", show_default=False)
]
StateDir = Annotated[
    str | None,
    typer.Option(
        "--state-dir",
        metavar="DIRECTORY",
        help="Of a server that was started with the same option.",
        show_default=False,
    ),
]


@app.callback()
def _apps() -> None:
    """Add apps, and look at what they use."""


@app.command("add")
def add(
    file: ManifestFile,
    replace: Annotated[
        bool, typer.Option("--replace", help="Give an app its new manifest; its key stays.")
    ] = False,
    state_dir: StateDir = None,
    as_json: AsJson = False,
) -> None:
    """Let an app use this machine, and print its key, which is not shown again."""
    from brim.apps.manifest import load_manifest
    from brim.cli.app_report import print_added, print_replaced
    from brim.cli.app_warnings import warnings_for

    manifest, text = load_manifest(file)
    # Before the key is made: what failed after that would cost it, since it is shown once.
    warnings, url = warnings_for(manifest), _base_url(state_dir)
    with _registry(_directory(state_dir)) as registry:
        is_replaced = replace and registry.get(manifest.name) is not None
        if is_replaced:
            registry.replace(manifest, text)
        else:
            key = registry.add(manifest, text)
    if is_replaced:
        print_replaced(manifest, warnings, as_json=as_json)
    else:
        print_added(manifest.name, key, url, warnings, as_json=as_json)


@app.command("check")
def check(file: ManifestFile, as_json: AsJson = False) -> None:
    """Read a manifest, and say what this machine lacks for it; nothing is added."""
    from brim.apps.manifest import load_manifest
    from brim.cli.app_report import print_checked
    from brim.cli.app_warnings import warnings_for

    manifest, _ = load_manifest(file)
    print_checked(manifest, warnings_for(manifest), as_json=as_json)


@app.command("list")
def list_(state_dir: StateDir = None, as_json: AsJson = False) -> None:
    """List the apps, with how much of their budgets they used today."""
    from brim.cli.app_report import print_list
    from brim.cli.app_usage import standings

    directory = _directory(state_dir)
    with _registry(directory) as registry:
        entries = registry.entries()
    print_list(entries, standings(entries, directory), as_json=as_json)


@app.command("show")
def show(name: Name, state_dir: StateDir = None, as_json: AsJson = False) -> None:
    """Show one app: what it may do, and the manifest that says so."""
    from brim.cli.app_report import print_entry

    with _registry(_directory(state_dir)) as registry:
        print_entry(registry.entry(name), as_json=as_json)


@app.command("remove")
def remove(name: Name, state_dir: StateDir = None, as_json: AsJson = False) -> None:
    """Forget an app and its key; running answers finish, and what it used stays on record."""
    from brim.cli.output import print_json

    with _registry(_directory(state_dir)) as registry:
        registry.remove(name)
    if as_json:
        print_json({"name": name, "is_removed": True})
    else:
        typer.echo(f"app '{name}' was removed; its key is refused from now on")


@app.command("rotate")
def rotate(name: Name, state_dir: StateDir = None, as_json: AsJson = False) -> None:
    """Give an app another key and print it; the old one is refused from now on."""
    from brim.cli.app_report import print_rotated

    url = _base_url(state_dir)  # as in `add`, before the key is made
    with _registry(_directory(state_dir)) as registry:
        key = registry.rotate(name)
    print_rotated(name, key, url, as_json=as_json)


@app.command("usage")
def usage(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="Only this app's.", show_default=False),
    ] = None,
    days: Annotated[
        int, typer.Option(min=1, max=MAX_DAYS, help="How many days, today included.")
    ] = 7,
    state_dir: StateDir = None,
    as_json: AsJson = False,
) -> None:
    """Show what apps used today of their budgets, and by day and model before."""
    from brim.cli.app_report import print_usage
    from brim.cli.app_usage import lines_of, standings

    directory = _directory(state_dir)
    lines = lines_of(directory, num_days=days, app=name)
    with _registry(directory) as registry:
        entries = registry.entries()
        if name is not None:
            known = registry.get(name) is not None
            # What a removed app used stays on record.
            entries = (registry.entry(name),) if known or not lines else ()
    print_usage(standings(entries, directory), lines, as_json=as_json)


def _directory(state_dir: str | None) -> Path:
    """The state directory that the settings name; says where a running server has another."""
    from brim.cli.errors import say
    from brim.cli.state import running_servers
    from brim.config.load import load_settings
    from brim.config.places import state_path

    loaded = load_settings({"server.state_directory": ("--state-dir", state_dir)})
    directory = state_path(loaded.settings)
    others = {server.state_directory for server in running_servers()} - {str(directory), ""}
    for other in sorted(others):
        say(f"a server runs that keeps its apps in {other}; for those add --state-dir {other}")
    return directory


@contextlib.contextmanager
def _registry(directory: Path) -> "Iterator[Registry]":
    from brim.apps.registry import FILE_NAME, Registry

    registry = Registry(directory / FILE_NAME)
    with contextlib.closing(registry):
        yield registry


def _base_url(state_dir: str | None) -> str:
    """Where clients find the server that has these apps, or would."""
    from brim.cli.state import ServerState, running_servers
    from brim.config.load import load_settings
    from brim.config.places import state_path

    settings = load_settings({"server.state_directory": ("--state-dir", state_dir)}).settings
    for server in running_servers():
        if server.state_directory == str(state_path(settings)):
            return f"{server.url}/v1"
    here = ServerState(
        pid=0,
        started_unix_s=0.0,
        host=settings.server.host,
        port=settings.server.port,
        drain_limit_s=0.0,
    )
    return f"{here.url}/v1"
