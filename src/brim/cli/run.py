"""`brim run`: one answer, or a conversation, from a worker of its own; no server is needed."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from brim.core.sampling import MAX_SEED

if TYPE_CHECKING:
    from brim.cli.conversation import Conversation
    from brim.config.tree import Settings
    from brim.core.plan import Plan

PIPE_PATIENCE_S = 1.0
"""A pipe that is silent for longer may have nobody behind it; the reader should know of it."""

NUM_SEQUENCES = 2
"""One answers while the other still holds the turns before it, which are then not read again."""


def run(
    prompt: Annotated[
        str | None, typer.Argument(help="What to ask; piped input is appended.", show_default=False)
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="A .gguf file, a model's directory, hf:ORG/REPO[:QUANT], a name that "
            "`brim recommend` lists, or demo.",
        ),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("-n", "--max-tokens", min=1, help="Longest answer, in tokens.")
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option("--temp", min=0.0, help="0 always takes the likeliest token."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=MAX_SEED, help="The same seed gives the same answer."),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Complete the text as it is, without a chat template.")
    ] = False,
    engine: Annotated[
        str | None, typer.Option(help="llamacpp, mlx or toy; by model and machine unless given.")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option("--ctx", "--context", min=1, help="Longest prompt plus answer, in tokens."),
    ] = None,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Keep no prompts on disk; in memory they are reused.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Load the model even if it does not fit.")
    ] = False,
) -> None:
    """Answer one prompt, or hold a conversation when there is none."""
    text = _prompt(prompt, raw)

    import msgspec

    from brim.cli.conversation import Conversation
    from brim.config.load import load_settings
    from brim.core.sampling import SamplingParams

    given = {"temperature": temperature, "seed": seed}
    wishes = {name: value for name, value in given.items() if value is not None}
    settings = load_settings(
        {"cache.enabled": ("--no-cache", False if no_cache else None)}
    ).settings
    if text is None and max_tokens is not None:
        # The settings' bound gives way to the room that is left, which shrinks with every turn; a
        # request's own bound is refused when it is too long.
        models = msgspec.structs.replace(settings.models, answer_tokens=max_tokens)
        settings, max_tokens = msgspec.structs.replace(settings, models=models), None
    conversation = Conversation(
        _plan(model, engine, context, settings),
        settings,
        max_tokens=max_tokens,
        sampling=msgspec.structs.replace(SamplingParams(), **wishes),
        raw=raw,
    )
    _hold(conversation, text, force)


def _hold(conversation: "Conversation", text: str | None, force: bool) -> None:
    """Load the model, answer once or until the reader leaves, and unload it."""
    import asyncio

    # One runner for all answers: between them the loop stands still and input can be read.
    with asyncio.Runner() as runner:
        try:
            runner.run(conversation.open(force=force))
            if text is None:
                conversation.converse(runner)
            else:
                runner.run(conversation.answer(text))
        finally:
            runner.run(conversation.close())


def _prompt(prompt: str | None, raw: bool) -> str | None:
    """The whole prompt; None for a conversation.

    Raises:
        typer.BadParameter: There is nothing to answer.
    """
    piped = "" if sys.stdin is None or sys.stdin.isatty() else _piped_input()
    if prompt is None and not piped and sys.stdin is not None and sys.stdin.isatty():
        if raw:
            raise typer.BadParameter("--raw completes one text; give it as PROMPT or pipe it in")
        return None
    # Bytes of the command line that are no UTF-8 come as lone surrogates, which nothing encodes.
    typed = None if prompt is None else prompt.encode("utf-8", "surrogateescape")
    asked = None if typed is None else typed.decode("utf-8", "replace")
    parts = [part for part in (asked, piped) if part and part.strip()]
    if not parts:
        raise typer.BadParameter("there is nothing to answer; give a PROMPT or pipe one in")
    return "\n\n".join(parts)


def _piped_input() -> str:
    """What was piped or redirected in; nothing from /dev/null or another device.

    Some programs give those they start a socket where a shell gives a pipe.
    """
    import os
    import select
    import stat

    from brim.cli.errors import say

    mode = os.fstat(sys.stdin.fileno()).st_mode
    if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
        if not select.select([sys.stdin], [], [], PIPE_PATIENCE_S)[0]:
            say("reading piped input; press Ctrl-D to end it")
    elif not stat.S_ISREG(mode):
        return ""
    return sys.stdin.buffer.read().decode("utf-8", "replace")


def _plan(
    model: str | None, engine: str | None, context: int | None, settings: "Settings"
) -> "Plan":
    from brim.cli import planning
    from brim.cli.errors import say
    from brim.cli.neighbours import has_neighbours
    from brim.machine.reading import read_machine

    if model is None:
        say(f"no model was named, so the small demo answers; {planning.HOW_TO_GET_A_MODEL}")
    return planning.plan_model(
        planning.DEMO if model is None else model,
        read_machine(),
        settings,
        engine=engine,
        context_tokens=context,
        max_sequences=NUM_SEQUENCES,
        is_only_model=not has_neighbours(),
    )
