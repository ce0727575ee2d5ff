"""`brim convert`: a safetensors checkpoint becomes a GGUF file that brim and others load."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def convert(
    model_dir: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL_DIR",
            help="A Llama checkpoint: config.json, tokenizer.json and model.safetensors.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT.gguf",
            help="The file to write; one that is there is replaced.",
            show_default=False,
        ),
    ],
    quant: Annotated[
        Literal["F16", "Q8_0"],
        typer.Option(case_sensitive=False, help="Q8_0 takes half the memory of F16."),
    ] = "F16",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Convert a safetensors checkpoint to GGUF."""
    if out.suffix.lower() != ".gguf":
        # Whoever swaps the two arguments must not lose a checkpoint.
        raise typer.BadParameter(f"the file to write must end in .gguf, not be '{out}'")

    import shlex

    from brim.cli.errors import say
    from brim.cli.output import gib, print_json
    from brim.registry.convert import convert_to_gguf

    spec = convert_to_gguf(model_dir, out, quant)
    if as_json:
        print_json(spec)
        return
    say(
        f"{out} is written: {spec.architecture}, {spec.num_parameters:,} parameters, "
        f"{spec.quant}, {gib(spec.weights_bytes)}; try it: brim run -m {shlex.quote(str(out))}"
    )
