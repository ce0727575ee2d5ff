"""`brim plan`: what models would cost and how fast they would run, before a byte is loaded."""

from typing import Annotated

import typer

from brim.core.plan import Objective


def plan(
    model: Annotated[
        list[str],
        typer.Argument(
            help="A file, a directory, hf:ORG/REPO, a name that `brim recommend` lists, or a "
            "config.json with --quant; several are planned together."
        ),
    ],
    objective: Annotated[
        Objective, typer.Option(help="What to favour where one thing costs another.")
    ] = Objective.DECODE,
    machine: Annotated[
        str | None,
        typer.Option(help="Another machine, as in 'M4 Max:40:128' (GPU cores, GB) or m4-16."),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option("--ctx", "--context", min=1, help="Longest prompt plus answer, in tokens."),
    ] = None,
    sequences: Annotated[int, typer.Option(min=1, help="Most sequences at once.")] = 1,
    kv: Annotated[
        str | None, typer.Option(help="KV type, as in q8_0, or K and V apart, as in q8_0/f16.")
    ] = None,
    draft: Annotated[
        str | None, typer.Option(help="A small model that drafts for the first one.")
    ] = None,
    quant: Annotated[
        str | None, typer.Option(help="Quant of a config.json or a named model: Q4_K_M, MLX 4bit.")
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="llamacpp or mlx; by model and machine unless given.")
    ] = None,
    depth: Annotated[
        int, typer.Option(min=0, help="Tokens in the sequence when decode begins.")
    ] = 0,
    prompt: Annotated[
        int, typer.Option(min=1, help="Length of the prompt behind prefill and first token.")
    ] = 512,
    what_if: Annotated[
        bool, typer.Option("--what-if", help="Beside the models that running servers hold.")
    ] = False,
    check: Annotated[
        bool,
        typer.Option(help="Ask llama.cpp what it would allocate for files that are here."),
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Plan models for a machine: memory by term, verdict, options with reasons, speed."""
    from brim.cli.errors import DOES_NOT_FIT, DONE
    from brim.cli.output import print_json
    from brim.cli.plan_report import print_report
    from brim.cli.plan_together import Wanted, plan_together

    wanted = Wanted(
        models=tuple(model),
        draft=draft,
        machine=machine,
        objective=objective,
        context_tokens=context,
        max_sequences=sequences,
        kv_type=kv,
        quant=quant,
        engine=engine,
        depth_tokens=depth,
        prompt_tokens=prompt,
        is_beside_servers=what_if,
        is_checked=check,
    )
    report = plan_together(wanted)
    if as_json:
        print_json(report)
    else:
        print_report(report)
    return DONE if report.fits else DOES_NOT_FIT
