"""`brim config`: the settings in force and where each came from."""

from typing import Annotated

import typer

app = typer.Typer(help="Look at the settings.", no_args_is_help=True)


@app.callback()
def _config() -> None:
    """Look at the settings."""


@app.command("show")
def show(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print every setting with its value and its origin."""
    from brim.cli.output import print_json, print_table
    from brim.config.load import load_settings

    listing = load_settings().listing()
    if as_json:
        print_json(listing)
    else:
        print_table(
            ("setting", "value", "origin"),
            [(setting.key, str(setting.value), setting.origin) for setting in listing],
        )
