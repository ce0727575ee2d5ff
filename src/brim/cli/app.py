"""Puts the subcommands together, and turns whatever they raise into a sentence and an exit code."""

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer
from typer.exceptions import TyperException

import brim
from brim.cli import (
    apps,
    bench,
    cache,
    calibrate,
    config,
    convert,
    doctor,
    events,
    forecast,
    machine,
    models,
    plan,
    ps,
    recommend,
    run,
    serve,
    stop,
)
from brim.cli.errors import FAILED, INTERRUPTED, exit_code_of, report, say

app = typer.Typer(
    name="brim",
    help="Run large language models locally: memory filled to the brim, never spilled.",
    no_args_is_help=True,
    # Rich help would take longer to import than everything else together.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("run")(run.run)
app.command("serve")(serve.serve)
app.command("plan")(plan.plan)
app.command("ps")(ps.ps)
app.command("events")(events.events)
app.command("stop")(stop.stop)
app.command("models")(models.models)
app.command("machine")(machine.machine)
app.command("calibrate")(calibrate.calibrate)
app.command("recommend")(recommend.recommend)
app.command("forecast")(forecast.forecast)
app.command("convert")(convert.convert)
app.command("doctor")(doctor.doctor)
app.add_typer(apps.app, name="apps")
app.add_typer(bench.app, name="bench")
app.add_typer(cache.app, name="cache")
app.add_typer(config.app, name="config")


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"brim {brim.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str]) -> int:
    """Run one command line; returns its exit code and never raises."""
    try:
        result = app(args=list(arguments), prog_name="brim", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except BrokenPipeError:
        return _end_quietly()
    except TyperException as error:
        return _bad_usage(error)
    except typer.Abort:
        return INTERRUPTED
    except SystemExit as error:
        # Typer's own answer to a reader that has gone.
        _end_quietly()
        return error.code if isinstance(error.code, int) else FAILED
    except BaseException as error:
        if not isinstance(error, KeyboardInterrupt):
            report(error)
        return exit_code_of(error)


def _bad_usage(error: TyperException) -> int:
    """One sentence on what is wrong with the command line, and where to look.

    A group that was named without a command is answered with its help, as it stands.
    """
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "brim"
    if context is not None and error.message == context.get_help():
        typer.echo(error.message, err=True)
        return error.exit_code
    if text := " ".join(error.format_message().split()):
        say(f"{text.rstrip('.')}; see: {command} --help")
    return error.exit_code


def _end_quietly() -> int:
    """The reader of our output has gone; keep the interpreter from complaining at its exit."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, sys.stdout.fileno())
    return FAILED
