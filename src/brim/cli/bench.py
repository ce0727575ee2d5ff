"""`brim bench`: what a model does on this machine, and servers side by side."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from brim.cli.bench_serve import serve
from brim.cli.bench_standin import standin
from brim.cli.numbers import whole_numbers

if TYPE_CHECKING:
    from brim.bench.speed import Case, Row
    from brim.core.model import ModelSpec
    from brim.core.plan import Plan
    from brim.engine.base import Engine

app = typer.Typer(
    help="Measure a model's speed here, or compare servers.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

app.command("serve")(serve)
app.command("standin")(standin)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, all samples included.")]


@app.command("speed")
def speed(
    model: Annotated[
        list[str],
        typer.Option(
            "--model",
            "-m",
            help="A .gguf file, a model's directory, hf:ORG/REPO[:QUANT], or demo; two forms of "
            "one model compare their engines.",
        ),
    ],
    engine: Annotated[
        str | None,
        typer.Option(
            help="mlx, llamacpp, or both in turns; by the model's form unless given. For both, a "
            "checkpoint without a GGUF form is converted to F16."
        ),
    ] = None,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="Prompt lengths in tokens, as 512,1024; 0: none.")
    ] = "512",
    generate: Annotated[
        str, typer.Option("--generate", "-n", help="Answer lengths in tokens; 0: none.")
    ] = "128",
    depth: Annotated[
        str, typer.Option("--depth", "-d", help="Tokens already in the context, as 0,4096.")
    ] = "0",
    batch: Annotated[
        str, typer.Option("--batch", "-b", help="Sequences that produce tokens at once, as 1,8.")
    ] = "1",
    repetitions: Annotated[
        int, typer.Option("--repetitions", "-r", min=1, help="Counted runs of each test.")
    ] = 5,
    threads: Annotated[
        int | None, typer.Option("--threads", "-t", min=1, help="Planned unless given.")
    ] = None,
    kv: Annotated[
        str | None, typer.Option(help="Type of the KV cache, as f16 or q8_0; planned unless given.")
    ] = None,
    flash_attention: Annotated[
        bool | None,
        typer.Option("--flash-attention/--no-flash-attention", help="Planned unless given."),
    ] = None,
    objective: Annotated[
        str | None, typer.Option(help="decode, prefill or memory; by the settings unless given.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Load the model even if it does not fit.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Time prefill (pp) and decode (tg) without a server; rows are named as llama-bench's."""
    from brim.bench import speed as bench
    from brim.cli.bench_engines import wants_comparison
    from brim.core.plan import Objective

    wanted = bench.cases(
        whole_numbers(prompt, "--prompt"),
        whole_numbers(generate, "--generate"),
        whole_numbers(depth, "--depth"),
        whole_numbers(batch, "--batch", least=1),
    )
    if objective not in (None, *Objective):
        raise typer.BadParameter(f"--objective is one of {', '.join(Objective)}; not '{objective}'")
    wishes = {"kv_type": kv, "flash_attention": flash_attention, "threads": threads}
    plan_of = _planner(wanted, objective, wishes)
    if wants_comparison(model, engine):
        _compare(model, wanted, repetitions, plan_of, force=force, as_json=as_json)
    else:
        plan = plan_of(_form(model[0], engine))
        _measure(plan, wanted, repetitions, force=force, as_json=as_json)


def _measure(
    plan: "Plan", wanted: "list[Case]", repetitions: int, *, force: bool, as_json: bool
) -> None:
    """Time one engine, in this process."""
    from brim.bench import speed as bench
    from brim.cli.errors import say
    from brim.cli.neighbours import granted
    from brim.cli.output import print_json

    with granted(plan.model.name, plan, force=force):
        loaded = _load(plan)
        try:
            rows = list(bench.measure(loaded, plan, wanted, repetitions=repetitions, progress=say))
        finally:
            loaded.shutdown()
    if as_json:
        print_json(rows)
    else:
        _print_speed(rows)


def _compare(
    models: list[str],
    wanted: "list[Case]",
    repetitions: int,
    plan_of: "Callable[[ModelSpec], Plan]",
    *,
    force: bool,
    as_json: bool,
) -> None:
    """Time two engines in turns, each in a process of its own."""
    from brim.bench.engines import compare_engines
    from brim.cli.bench_engines import print_comparison, specs_of, together
    from brim.cli.errors import say
    from brim.cli.neighbours import granted
    from brim.cli.output import print_json

    with specs_of(models, say) as specs:
        plans = [plan_of(spec) for spec in specs]
        with granted(plans[0].model.name, together(plans), force=force):
            found = compare_engines(plans, wanted, repetitions=repetitions, progress=say)
    if as_json:
        print_json(found)
    else:
        print_comparison(found)


def _form(model: str, engine: str | None) -> "ModelSpec":
    """The form of a model that the engine loads: the one asked for, or the default here.

    Raises:
        BrimError: It cannot be found, or has no such form.
    """
    from brim.cli.dispatch import choose_form
    from brim.cli.neighbours import machine_beside_servers
    from brim.registry.sources import forms_of

    return choose_form(forms_of(model), machine_beside_servers(), engine=engine).form.fetch()


def _planner(
    wanted: "list[Case]", objective: str | None, wishes: dict[str, Any]
) -> "Callable[[ModelSpec], Plan]":
    """Plans whose KV holds the largest test, for the engine that loads a model's form."""
    from brim.cli.dispatch import ENGINE_OF_FORMAT
    from brim.cli.neighbours import machine_beside_servers
    from brim.config.load import load_settings
    from brim.core.plan import Objective
    from brim.planner.plan import make_plan

    settings = load_settings().settings.models
    machine = machine_beside_servers()

    def plan(spec: "ModelSpec") -> "Plan":
        return make_plan(
            spec,
            machine,
            engine=ENGINE_OF_FORMAT[spec.format],
            objective=Objective(objective) if objective else settings.objective,
            # One window is what every pool holds, whatever the number of sequences.
            context_tokens=max(case.num_tokens for case in wanted),
            max_sequences=max(case.num_sequences for case in wanted),
            **wishes,
        )

    return plan


def _load(plan: "Plan") -> "Engine":
    import os

    from brim.engine import factory

    # Thread settings count from the moment the backend's libraries are loaded, which is now.
    os.environ.update(plan.environment)
    engine = factory.create(plan.engine)
    engine.load(plan)
    return engine


def _print_speed(rows: "list[Row]") -> None:
    from brim.cli.output import print_table

    head = ("test", "tok/s", "min", "max", "mean", "threads", "kv", "flash", "repack")
    print_table(
        head,
        [
            (
                row.test,
                f"{row.median_ts:.2f}",
                f"{row.min_ts:.2f}",
                f"{row.max_ts:.2f}",
                f"{row.avg_ts:.2f} ± {row.stddev_ts:.2f}",
                str(row.n_threads),
                row.type_k,
                "on" if row.flash_attn else "off",
                "on" if row.repack else "off",
            )
            for row in rows
        ],
        right=frozenset({1, 2, 3, 4, 5}),
    )
