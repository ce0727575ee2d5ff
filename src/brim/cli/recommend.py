"""`brim recommend`: which models suit a machine, and which machines a model."""

from typing import Annotated

import typer

from brim.planner.recommend import Use

NUM_MODELS = 10
NUM_MACHINES = 20
"""Shown unless asked for more: a screen of each."""


def recommend(
    use: Annotated[
        Use | None,
        typer.Option(
            help="What it is wanted for: chat unless given; it decides the context as well.",
            show_default=False,
        ),
    ] = None,
    machine: Annotated[
        str | None,
        typer.Option(
            help="Another machine, as in 'M4 Max:40:128' (GPU cores, GB) or m4-16.",
            show_default=False,
        ),
    ] = None,
    wanted: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="MODEL",
            help="The reverse: the machines that run this model, least memory first.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="How many to show.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Rank models and quants for this machine or another, with memory, speed and quality cost."""
    if machine is not None and wanted is not None:
        raise typer.BadParameter(
            "--for looks for machines and --machine names one; leave one out, or ask: "
            "brim plan MODEL --machine NAME"
        )
    from brim.cli.errors import DOES_NOT_FIT, DONE
    from brim.cli.output import print_json
    from brim.cli.recommend_plans import report_machines, report_models
    from brim.cli.recommend_report import print_machines, print_models

    if wanted is not None:
        machines = report_machines(wanted, use, limit or NUM_MACHINES)
        print_json(machines) if as_json else print_machines(machines)
        return DONE if machines.machines else DOES_NOT_FIT
    models = report_models(machine, use or Use.CHAT, limit or NUM_MODELS)
    print_json(models) if as_json else print_models(models)
    return DONE if models.fits else DOES_NOT_FIT
