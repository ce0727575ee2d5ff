"""`brim models`: the models on this machine."""

from typing import Annotated

import typer


def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the models on this machine, with what -m takes to load each."""
    from brim.cli.output import gib, print_json, print_table
    from brim.registry.sources import list_local

    found = list_local()
    if as_json:
        print_json(found)
        return
    rows = []
    for model in found:
        spec = model.spec
        if spec is None:
            rows.append((model.reference, "-", "-", "-", model.problem))
        else:
            context = str(spec.trained_context_tokens)
            rows.append((model.reference, spec.quant, gib(spec.weights_bytes), context, model.path))
    print_table(("model", "quant", "weights", "context", "file"), rows, right=frozenset({2, 3}))
