"""`brim serve`: the HTTP server over the models that were named, until it is told to stop."""

from pathlib import Path
from typing import Annotated

import typer

from brim.core.plan import Objective


def serve(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            help="A .gguf file, a model's directory, hf:ORG/REPO[:QUANT], a name that "
            "`brim recommend` lists, or demo; NAME=REF has clients call it NAME; may be repeated.",
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option("--ctx", "--context", min=1, help="Longest prompt plus answer, in tokens."),
    ] = None,
    objective: Annotated[
        Objective | None, typer.Option(help="What to favour where one thing costs another.")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(help="llamacpp or mlx, for all of them; by model and machine unless given."),
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on; 0.0.0.0 is every interface.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port; 0 picks a free one.")
    ] = None,
    state_dir: Annotated[
        str | None,
        typer.Option(
            help="Where apps, usage and events are kept; a second server needs its own.",
            show_default=False,
        ),
    ] = None,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Keep no prompts on disk; in memory they are reused.")
    ] = False,
    wait: Annotated[
        float,
        typer.Option(
            min=0.0, help="Seconds to wait at the start for memory that other programs hold."
        ),
    ] = 0.0,
    force: Annotated[
        bool, typer.Option("--force", help="Load models even if they do not fit.")
    ] = False,
    simulate: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Serve on a simulated machine that goes through a scenario, as those in "
            "examples/scenarios; models are real, and so must fit this machine.",
            show_default=False,
        ),
    ] = None,
    simulate_speed: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            max=100.0,
            metavar="N",
            help="Seconds of the scenario for each second; 1 unless given.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Serve models over HTTP until SIGTERM or Ctrl-C; running answers finish first."""
    if simulate_speed is not None and simulate is None:
        raise typer.BadParameter("--simulate-speed is a scenario's; give one with --simulate FILE")
    import asyncio

    from brim.cli import planning, serving
    from brim.cli.errors import say
    from brim.cli.simulation import open_simulation
    from brim.cli.state import clean_up, locked_state
    from brim.config.load import load_settings
    from brim.machine.reading import read_machine
    from brim.server.serve import listen, new_event_loop

    loaded = load_settings(
        {
            "server.host": ("--host", host),
            "server.port": ("--port", port),
            "server.state_directory": ("--state-dir", state_dir),
            "models.objective": ("--objective", objective),
            "cache.enabled": ("--no-cache", False if no_cache else None),
        }
    )
    settings = loaded.settings
    simulation = None if simulate is None else open_simulation(simulate, simulate_speed or 1.0)
    # A context that somebody wrote down is kept or refused; only the default gives way to memory,
    # and with it load options, of which the exact profile has one choice.
    is_default = context is None and loaded.origins["models.context_tokens"] == "default"
    may_shrink = is_default and not settings.models.exact_profile
    # Locked and bound first: another server should be known before gigabytes are read.
    with (
        locked_state(settings) as state,
        listen(settings.server.host, settings.server.port) as listener,
    ):
        state.note_port(int(listener.getsockname()[1]))
        apps = serving.known_apps(settings, listener)
        # Before the machine is read: their memory is free for our models.
        for done in clean_up(settings):
            say(done)
        if not model:
            say(f"no model was named, so the small demo is served; {planning.HOW_TO_GET_A_MODEL}")
        machine = read_machine()
        plans = [
            planning.plan_model(
                reference, machine, settings, name=name, engine=engine, context_tokens=context
            )
            for name, reference in map(planning.split_name, model or [planning.DEMO])
        ]
        planning.check_names(plans)
        for doubt in planning.names_not_served(settings.models, plans):
            say(doubt)
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(
                serving.serve_until_signal(
                    plans,
                    settings,
                    listener,
                    apps,
                    force=force,
                    may_shrink=may_shrink,
                    wait_s=wait,
                    simulation=simulation,
                )
            )
