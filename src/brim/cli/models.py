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
            rows.append((model.reference, "-", "-", "-", "-", model.problem))
        else:
            context = str(spec.trained_context_tokens)
            weights = gib(spec.weights_bytes)
            rows.append((model.reference, spec.format, spec.quant, weights, context, model.path))
    head = ("model", "form", "quant", "weights", "context", "file")
    print_table(head, rows, right=frozenset({3, 4}))
