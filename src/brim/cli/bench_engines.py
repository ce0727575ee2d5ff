"""`brim bench speed` with several engines: which form each one loads, and the tables."""

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from brim.core.memory import MemoryTerms
from brim.core.model import ModelSpec
from brim.errors import ConfigError, Unsupported

if TYPE_CHECKING:
    from brim.bench.engines import Comparison, EngineSide
    from brim.core.plan import Plan
    from brim.registry.forms import Form

BOTH = "both"
"""What `--engine` says for a comparison."""

Forms = dict[str, Callable[[], ModelSpec]]
"""Engine -> the model in the form that it loads, fetched or made when it is called."""


def wants_comparison(models: Sequence[str], engine: str | None) -> bool:
    """Whether more than one engine is to be measured.

    Raises:
        ConfigError: Several models are named, and one engine.
    """
    if len(models) > 1 and engine not in (None, BOTH):
        raise ConfigError(
            f"several models are for several engines; leave --engine {engine:.40} out, or name one "
            "model",
            param="engine",
        )
    return engine == BOTH or len(models) > 1


@contextlib.contextmanager
def specs_of(models: Sequence[str], progress: Callable[[str], None]) -> Iterator[list[ModelSpec]]:
    """The model in the form of each engine, the fallback's last; made files are removed again.

    Args:
        models: One reference, or two forms of one model.
        progress: Told what is made.

    Raises:
        ConfigError: An engine has no form or is not installed, or two references are for one.
        BrimError: A model cannot be found, read or converted.
    """
    from brim.registry.sources import forms_of

    with contextlib.ExitStack() as stack:
        if len(models) == 1:
            found = _by_engine(forms_of(models[0]))
            if set(found) == {"mlx"}:
                found["llamacpp"] = _converted(found["mlx"], stack, progress)
        else:
            found = _named(models)
        missing = sorted({"mlx", "llamacpp"} - set(found))
        if missing:
            form = {"mlx": "safetensors", "llamacpp": "GGUF"}[missing[0]]
            raise ConfigError(
                f"{models[0]:.200} has no form for {missing[0]}; name its {form} form by another "
                "-m, or leave --engine both out"
            )
        check_engines(found)  # before anything is fetched or converted
        yield [found[engine]() for engine in ("mlx", "llamacpp")]


def _by_engine(forms: "Sequence[Form]") -> Forms:
    from brim.cli.dispatch import ENGINE_OF_FORMAT

    return {ENGINE_OF_FORMAT[form.format]: form.fetch for form in forms}


def _named(models: Sequence[str]) -> Forms:
    """The one form of each of several references."""
    from brim.registry.sources import forms_of

    found: Forms = {}
    for model in models:
        forms = _by_engine(forms_of(model))
        if len(forms) > 1:
            raise ConfigError(
                f"{model:.200} has more than one form; name it alone with --engine both"
            )
        ((engine, fetch),) = forms.items()
        if engine in found:
            raise ConfigError(
                f"two of the models are for {engine}; name one for each engine, or measure them "
                "in two runs"
            )
        found[engine] = fetch
    return found


def _converted(
    fetch: Callable[[], ModelSpec], stack: contextlib.ExitStack, progress: Callable[[str], None]
) -> Callable[[], ModelSpec]:
    """Makes the GGUF form of a checkpoint, on the disk where stand-ins are made too."""

    def convert() -> ModelSpec:
        import platformdirs

        from brim.registry.convert import convert_to_gguf

        source = fetch()
        cache = platformdirs.user_cache_path("brim", appauthor=False, ensure_exists=True)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=cache)))
        progress(f"converting {source.name} to GGUF F16 for llama.cpp")
        try:
            out = folder / f"{source.name}.gguf"
            return convert_to_gguf(Path(source.paths[0]).parent, out, "F16", name=source.name)
        except Unsupported as exc:
            raise Unsupported(f"{exc.message}; name its GGUF form by another -m") from exc

    return convert


def together(plans: "Sequence[Plan]") -> MemoryTerms:
    """What all of them take, for one grant: their processes live side by side."""
    first, *others = (plan.memory for plan in plans)
    for other in others:
        summed = {
            name: getattr(first, name) + getattr(other, name) for name in first.__struct_fields__
        }
        first = MemoryTerms(**summed)
    return first


def check_engines(engines: Iterable[str]) -> None:
    """Refuse before anything is made where an engine is not installed.

    Raises:
        ConfigError: Says what to install.
    """
    from brim.engine.factory import available_engines, how_to_install

    for engine in engines:
        if engine not in available_engines():
            raise ConfigError(how_to_install(engine), param="engine")


# --- tables ------------------------------------------------------------------------------------


def print_comparison(found: "Comparison") -> None:
    """Rates of every engine and their ratio, then memory beside the plan."""
    from brim.cli.output import print_table

    first, *others = found.sides
    head = ["test", *(f"{side.engine} tok/s" for side in found.sides)]
    head += [f"{side.engine} / {first.engine}" for side in others]
    ratios = {(ratio.engine, ratio.test): ratio.ratio for ratio in found.ratios}
    table = []
    for place, row in enumerate(first.rows):
        rates = [side.rows[place] for side in found.sides]
        cells = [f"{rate.median_ts:.2f} ({rate.min_ts:.2f}-{rate.max_ts:.2f})" for rate in rates]
        for side in others:
            ratio = ratios[side.engine, row.test]
            cells.append(f"{ratio.median:.3f} ({ratio.minimum:.3f}-{ratio.maximum:.3f})")
        table.append([row.test, *cells])
    print_table(head, table, right=frozenset(range(1, len(head))))
    typer.echo()
    names = ("engine", "form", "kv", "load", "weights", "anonymous", "mapped", "planned")
    print_table(names, [_memory_row(side) for side in found.sides], right=frozenset(range(3, 8)))
    typer.echo()
    for side in found.sides:
        typer.echo(
            f"note: {side.engine}'s memory was read with {side.memory.num_tokens} tokens in its "
            f"sequences; planned is a full context"
        )


def _memory_row(side: "EngineSide") -> list[str]:
    from brim.cli.output import gib

    def shown(num_bytes: int | None) -> str:
        return "-" if num_bytes is None else gib(num_bytes)

    memory, row = side.memory, side.rows[0]
    kv = row.type_k if row.type_k == row.type_v else f"{row.type_k}/{row.type_v}"
    weights = memory.footprint.weights_bytes if memory.footprint else None
    return [
        side.engine,
        f"{side.model} {side.quant}",
        kv,
        f"{side.load_s:.1f} s",
        shown(weights),
        shown(memory.dirty_bytes),
        shown(memory.file_bytes),
        gib(memory.planned.resident_bytes),
    ]
