"""Checks the catalogue by arithmetic: parameters by each config against the published count.

Prints a line for each model and a summary; docs/catalogue.md quotes it.  Needs no network.

    python benches/check_catalogue.py
"""

import statistics

from brim.registry.catalogue import CatalogueEntry, entries
from brim.registry.config_json import spec_from_config


def difference(entry: CatalogueEntry) -> float:
    """Counted over published parameters, less one."""
    spec = spec_from_config(entry.config, quant=entry.default_quant, name=entry.name)
    return spec.num_parameters / entry.published_parameters - 1


def main() -> None:
    print("| model | counted | published | difference | per token | default quant | file |")
    print("|---|--:|--:|--:|--:|---|--:|")
    for entry in entries():
        spec = spec_from_config(entry.config, quant=entry.default_quant, name=entry.name)
        print(
            f"| {entry.name} | {spec.num_parameters / 1e9:.3f} B "
            f"| {entry.published_parameters / 1e9:g} B | {100 * difference(entry):+.1f} % "
            f"| {spec.active_parameters / 1e9:.2f} B | {entry.default_quant} "
            f"| {spec.weights_bytes / 1e9:.2f} GB |"
        )
    errors = [abs(difference(entry)) for entry in entries()]
    print(
        f"\n{len(errors)} models: median difference {100 * statistics.median(errors):.2f} %, "
        f"largest {100 * max(errors):.1f} %"
    )


if __name__ == "__main__":
    main()
