"""`brim cache`: the prefixes of prompts whose KV is kept on disk."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from brim.core.cache import CacheOptions
    from brim.prefix_cache.eviction import Kept
    from brim.prefix_cache.inspect import DirectoryStats

app = typer.Typer(help="Look at and clean the prefix cache on disk.", no_args_is_help=True)

MAX_GIB = 2**30
"""An exbibyte: no disk is larger, and its bytes are still a number."""

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback()
def _cache() -> None:
    """Look at and clean the prefix cache on disk."""


@app.command("list")
def list_(as_json: AsJson = False) -> None:
    """List the entries, last used first."""
    from pathlib import Path

    from brim.cli.output import print_json, print_table
    from brim.prefix_cache.inspect import list_entries

    entries = list_entries(Path(_options().directory))
    if as_json:
        print_json([_fields(kept) for kept in entries])
        return
    head = ("model", "namespace", "tokens", "size", "last used", "entry")
    print_table(head, [_row(kept) for kept in entries], right=frozenset({2, 3}))


@app.command("stats")
def stats(as_json: AsJson = False) -> None:
    """Show what the cache holds of its budget, its day's writes and the disk."""
    from brim.cli.output import print_json
    from brim.prefix_cache.inspect import directory_stats

    found = directory_stats(_options())
    if as_json:
        print_json(found)
    else:
        _print_stats(found)


@app.command("verify")
def verify(
    remove: Annotated[bool, typer.Option("--remove", help="Remove what is damaged.")] = False,
    as_json: AsJson = False,
) -> int:
    """Read every entry and check it; ends with 1 where one is damaged and stays."""
    from pathlib import Path

    from brim.cli.errors import DONE, FAILED
    from brim.cli.output import print_json
    from brim.engine import kv_block
    from brim.prefix_cache.inspect import verify as verify_entries

    num_files, damaged = verify_entries(Path(_options().directory), kv_block.read, remove=remove)
    if as_json:
        print_json({"num_entries": num_files, "damaged": damaged, "is_removed": remove})
    else:
        for each in damaged:
            typer.echo(f"{each.path}: {each.problem}")
        what = "removed" if remove else "damaged; remove them with: brim cache verify --remove"
        typer.echo(f"{num_files} entries read" + (f", {len(damaged)} {what}" if damaged else ""))
    return FAILED if damaged and not remove else DONE


@app.command("trim")
def trim(
    to_gib: Annotated[
        float | None,
        typer.Option(
            "--to",
            min=0,
            max=MAX_GIB,
            metavar="GIB",
            help="Leave this much at most; unless given, the budget of the settings.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Remove what a crash left and, least valuable first, what is over the budget."""
    import msgspec

    from brim.prefix_cache.inspect import trim as trim_entries

    options = _options()
    if to_gib is not None:
        options = msgspec.structs.replace(options, budget_bytes=int(to_gib * 2**30))
    _print_gone(trim_entries(options), as_json=as_json)


@app.command("clear")
def clear(
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Only entries of this model.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Remove all entries; what is lost is time."""
    from pathlib import Path

    from brim.errors import NotFound
    from brim.prefix_cache.inspect import clear as clear_entries
    from brim.prefix_cache.inspect import list_entries

    directory = Path(_options().directory)
    names = {kept.model_name for kept in list_entries(directory)}
    if model is not None and model not in names:
        known = ", ".join(sorted(names)) or "none"
        raise NotFound(f"no entry is of a model named '{model}'; there are entries of: {known}")
    _print_gone(clear_entries(directory, model), as_json=as_json)


def _options() -> "CacheOptions":
    """Bounds by the settings, whether or not the cache is on."""
    import msgspec

    from brim.config.load import load_settings
    from brim.core.cache import CacheOptions
    from brim.runtime.worker_options import cache_directory

    settings = load_settings().settings.cache
    bounds = {
        name: getattr(settings, name)
        for name in CacheOptions.__struct_fields__
        if name != "directory"
    }
    return msgspec.convert({**bounds, "directory": str(cache_directory(settings))}, CacheOptions)


def _fields(kept: "Kept") -> dict[str, Any]:
    import msgspec

    return msgspec.structs.asdict(kept)


def _row(kept: "Kept") -> tuple[str, ...]:
    from datetime import datetime

    from brim.cli.output import gib

    used = datetime.fromtimestamp(kept.used_unix_s).astimezone()
    return (
        kept.model_name,
        kept.namespace or "-",
        f"{kept.start}-{kept.end}",
        gib(kept.num_bytes),
        used.strftime("%Y-%m-%d %H:%M"),
        kept.key[:12],
    )


def _print_stats(found: "DirectoryStats") -> None:
    from brim.cli.output import gib, print_table

    typer.echo(
        f"{found.directory}: {found.num_entries} entries, {gib(found.entry_bytes)} of "
        f"{gib(found.budget_bytes)}; written today: {gib(found.written_bytes_today)} of "
        f"{gib(found.daily_write_bytes)}; free on the disk: {gib(found.free_disk_bytes)}, "
        f"of which {gib(found.free_disk_floor_bytes)} stay free"
    )
    if not found.models:
        return
    rows = [
        (
            use.model + (" (removed)" if use.is_removed else ""),
            str(use.num_entries),
            gib(use.entry_bytes),
            use.directory[:12],
        )
        for use in found.models
    ]
    print_table(("model", "entries", "size", "directory"), rows, right=frozenset({1, 2}))


def _print_gone(gone: "Sequence[Kept]", *, as_json: bool) -> None:
    from brim.cli.output import gib, print_json

    num_bytes = sum(kept.num_bytes for kept in gone)
    if as_json:
        print_json({"num_removed": len(gone), "removed_bytes": num_bytes})
    else:
        typer.echo(f"{len(gone)} entries removed, {gib(num_bytes)}")
