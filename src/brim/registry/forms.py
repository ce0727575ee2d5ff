"""The forms in which one model is at hand: GGUF files for llama.cpp, safetensors for MLX, or both.

Which form is taken is not decided here: that is by engine, and the planner's.
"""

import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from brim.core.model import ModelSpec
from brim.errors import BrimError, InvalidRequest, NotFound
from brim.registry.config_json import spec_from_config
from brim.registry.describe import describe_gguf
from brim.registry.describe_safetensors import describe_directory
from brim.registry.hub import Hub, Listing
from brim.registry.hub_choice import HubFile, choose, has_checkpoint, has_gguf
from brim.registry.safetensors_header import has_safetensors, read_json

FORMATS = ("gguf", "safetensors", "toy")
"""What `ModelSpec.format` can be, in the order in which a form is taken where nobody asks."""


class Form(NamedTuple):
    """One form of a model."""

    format: str
    describe: Callable[[], ModelSpec]
    """What can be known from headers; of a file on the hub without downloading it."""
    fetch: Callable[[], ModelSpec]
    """The model with its files on this machine, downloaded where they are not."""


def first_of(forms: Iterable[Form], formats: Sequence[str] = FORMATS) -> Form:
    """The form that comes first in `formats`.

    Raises:
        ValueError: There is none of them.
    """
    return min(forms, key=lambda form: formats.index(form.format))


def file_form(path: Path, name: str | None) -> Form:
    """A GGUF file."""
    return _here("gguf", lambda: describe_gguf(path, name))


def directory_forms(path: Path, quant: str | None, name: str | None) -> tuple[Form, ...]:
    """What a directory holds.

    Args:
        path: The directory, which is not searched below.
        quant: Which of its GGUF files is meant; of a checkpoint, a quant to plan it in.
        name: What clients will call it.

    Raises:
        NotFound: It holds no model.
        InvalidRequest: A quant is missing, or unknown.
        ModelFileError: Its config is damaged.
    """
    files = [HubFile(name=file.name) for file in path.iterdir() if file.is_file()]
    if not has_gguf(files):
        if all(file.name != "config.json" for file in files):
            raise NotFound(
                f"{path} is a directory without models; name one with a .gguf file, or with a "
                "config.json and its model.safetensors"
            )
        return (checkpoint_form(path, quant, name),)
    # A quant names a GGUF file where there are any, and a config may lie beside them for its own.
    if quant is not None or not has_checkpoint(files):
        return (_here("gguf", lambda: describe_gguf(gguf_in(path, quant) or path, name)),)
    # In two forms it is one model, which is called the same whichever is taken.
    called = name or path.resolve().name.lower()
    gguf = _here("gguf", lambda: describe_gguf(gguf_in(path, None) or path, called))
    return gguf, checkpoint_form(path, None, called)


def checkpoint_form(path: Path, quant: str | None, name: str | None) -> Form:
    """The checkpoint in a directory, or with a quant, what it would be in that.

    Raises:
        InvalidRequest: It has no weights, and no quant is given to plan it in; or an unknown one.
        ModelFileError: Its config is damaged.
    """
    has_weights = has_safetensors(file.name for file in path.iterdir())
    if quant is None and has_weights:
        return _here("safetensors", lambda: describe_directory(path, name=name))
    if quant is None:
        raise InvalidRequest(
            f"{path} has a config.json and no model.safetensors; bring the weights there to load "
            f"it, or name a quant to plan it in, as in {path}:Q4_K_M or '{path}:MLX 4bit'"
        )
    return config_form(path / "config.json", quant, name)


def config_form(config: Path, quant: str | None, name: str | None) -> Form:
    """What a config.json would be in a quant: to plan, not to load.

    Raises:
        InvalidRequest: No quant is given, or an unknown one.
        ModelFileError: It is damaged.
    """
    if quant is None:
        raise InvalidRequest(
            f"{config} does not say which quant to plan for; name one behind it, as in "
            f"{config}:Q4_K_M or '{config}:MLX 4bit', or by --quant Q4_K_M"
        )
    spec = spec_from_config(
        read_json(config), quant=quant, name=name or name_of_config(config).lower()
    )

    def refuse() -> ModelSpec:
        raise InvalidRequest(
            f"{config.parent} has no weights in {quant}; {how_to_get_quant(config.parent, quant)}"
        )

    return Form(spec.format, lambda: spec, refuse)


def repository_forms(
    repo_id: str, quant: str | None, name: str | None, hub: Hub
) -> tuple[Form, ...]:
    """What a repository of the hub has.

    Args:
        repo_id: `ORG/REPO`.
        quant: Which of its GGUF files is meant; of a repository without them, one to plan it in.
        name: What clients will call it.
        hub: The hub, which is asked once.

    Raises:
        BrimError: As `Hub.look`.
    """
    listing = hub.look(repo_id)
    forms = []
    is_checkpoint = quant is None and has_checkpoint(listing.files)
    if is_checkpoint:  # whether or not it has GGUF files too: one name for both forms
        name = name or repo_id.partition("/")[2].lower()
    if has_gguf(listing.files):
        forms.append(
            Form(
                "gguf",
                lambda: hub.describe_gguf(listing, quant, name),
                lambda: describe_gguf(hub.fetch_gguf(listing, quant), name),
            )
        )
    if is_checkpoint:
        forms.append(
            Form(
                "safetensors",
                lambda: hub.describe_checkpoint(listing, None, name),
                lambda: describe_directory(hub.fetch_checkpoint(listing), name=name),
            )
        )
    if not forms and quant is not None and "config.json" in {file.name for file in listing.files}:
        forms.append(_planned(listing, quant, name, hub))
    return tuple(forms) or (_nothing(listing, quant, name, hub),)


def _planned(listing: Listing, quant: str, name: str | None, hub: Hub) -> Form:
    """What a repository's config would be in a quant: to plan, not to load."""
    spec = hub.describe_checkpoint(listing, quant, name)

    def refuse() -> ModelSpec:
        raise NotFound(
            f"hf:{listing.repo_id} has no GGUF files to choose {quant:.40} from: leave it out to "
            "load its safetensors, or look for a repository whose name ends in GGUF"
        )

    return Form(spec.format, lambda: spec, refuse)


def _nothing(listing: Listing, quant: str | None, name: str | None, hub: Hub) -> Form:
    """Says what is missing when it is asked for, as for any other repository."""

    def fetch() -> ModelSpec:
        return describe_gguf(hub.fetch_gguf(listing, quant), name)

    return Form("gguf", lambda: hub.describe_checkpoint(listing, quant, name), fetch)


def catalogue_forms(
    reference: str, quant: str | None, name: str | None, hub: Callable[[], Hub]
) -> tuple[Form, ...]:
    """A model of the catalogue: in the quant that is meant, or in each form's usual one.

    Raises:
        NotFound: No model has that name, or not in that quant.
        InvalidRequest: The name has another quant behind it, or the quant is unknown.
    """
    from brim.registry.catalogue import find, is_model_name

    entry, meant = find(reference, quant)
    called = name or entry.name.lower()
    quants = [meant]
    if quant is None and is_model_name(reference) and entry.default_mlx_quant is not None:
        quants.append(entry.default_mlx_quant)

    def form(quant: str) -> Form:
        spec = entry.spec(quant, called)

        def fetch() -> ModelSpec:
            if quant not in (*entry.gguf_quants, *entry.mlx):
                published = ", ".join((*entry.gguf_quants, *entry.mlx))
                raise NotFound(f"{entry.name} is not published in {quant}; choose: {published}")
            repo_id, _, selected = entry.pull_name(quant).removeprefix("hf:").partition(":")
            forms = repository_forms(repo_id, selected or None, called, hub())
            wanted = [each for each in forms if each.format == spec.format] or list(forms)
            return wanted[0].fetch()

        return Form(spec.format, lambda: spec, fetch)

    return tuple(form(quant) for quant in quants)


def gguf_in(directory: Path, quant: str | None) -> Path | None:
    """The GGUF file in a directory, or a split one's first part; None where it has no model.

    Args:
        directory: Which is not searched below.
        quant: A quant's name or a file's; None as for a repository.

    Raises:
        NotFound: None of its files is in that quant.
        InvalidRequest: Several are.
        ModelFileError: A part is missing.
    """
    files = [HubFile(name=path.name) for path in directory.iterdir() if path.is_file()]
    if not has_gguf(files):
        return None
    return directory / choose(files, quant, str(directory))[0].name


def name_of_config(path: Path) -> str:
    """What a model is called of which only a config is at hand: its directory, or the file."""
    return path.stem if path.stem != "config" else path.resolve().parent.name


def how_to_get_gguf(spec: ModelSpec) -> str:
    """What to do for a GGUF form of a safetensors model."""
    directory = Path(spec.paths[0]).parent if spec.paths else None
    if directory is not None and is_convertible(directory):
        return f"convert it: {how_to_convert(directory, spec.name)}"
    return "name a GGUF form of the model (hf:ORG/REPO-GGUF)"


def how_to_get_quant(directory: Path, quant: str) -> str:
    """What to do to load a quant that a directory with a config.json has not."""
    if not has_safetensors(file.name for file in directory.iterdir()):
        return "name a directory or a repository that has them"
    made = {"f16": "", "q8_0": " --quant Q8_0"}.get(quant.lower())
    if made is not None and is_convertible(directory):
        return f"make them: {how_to_convert(directory, directory.resolve().name)}{made}"
    return f"leave {quant} out to load what is there, or name a repository that has them"


def how_to_convert(directory: Path, name: str) -> str:
    """The command that makes a GGUF file of a checkpoint."""
    return f"brim convert {shlex.quote(str(directory))} {shlex.quote(f'{name}.gguf')}"


def is_convertible(directory: Path) -> bool:
    """Whether `brim convert` takes the checkpoint in a directory."""
    # Only where something was refused: it reads the whole vocabulary, and its imports take longer.
    from brim.registry.convert import read_convertible

    try:
        read_convertible(directory)
    except BrimError:
        return False
    return True


def _here(format: str, describe: Callable[[], ModelSpec]) -> Form:
    """A form whose files are on this machine."""
    return Form(format, describe, describe)
