"""From what a user types to what a stand-in is made of: a GGUF file, a config, a name."""

from pathlib import Path
from typing import Any

from brim.bench.standin.blueprint import Blueprint
from brim.bench.standin.checkpoint import CheckpointModel
from brim.bench.standin.clone import clone_blueprint, clone_remote
from brim.bench.standin.config import dimensions_from_config
from brim.bench.standin.forms import Buildable
from brim.bench.standin.templates import blueprint
from brim.errors import InvalidRequest, NotFound, Unsupported
from brim.registry import catalogue
from brim.registry.catalogue import CatalogueEntry
from brim.registry.describe import model_stem
from brim.registry.hub import Hub
from brim.registry.quants import MlxQuant, parse_quant
from brim.registry.remote import files_at, remote_json
from brim.registry.safetensors_header import read_json
from brim.registry.sources import (
    DEMO_PATH,
    DESCRIBED_FORMS,
    gguf_in,
    name_of_config,
    path_and_quant,
    repository_and_quant,
)

DEFAULT_QUANT = "Q4_K_M"
"""What most people load: half a byte a weight, at little loss."""


def standin_of(
    reference: str, quant: str | None = None, *, hub: Hub | None = None
) -> tuple[str, Buildable]:
    """The name of the model that `reference` names, and what a stand-in of it is made of.

    Args:
        reference: A .gguf file or its address, hf:ORG/REPO[:QUANT], a config.json, a directory
            with either (both may have `:QUANT` behind them), a name of the catalogue, or `demo`.
            Of what is remote only headers are fetched.
        quant: For a config or a name, or to choose among a repository's or directory's files; a
            GGUF file has its own.
        hub: Another hub or cache than the environment names.

    Raises:
        NotFound: Nothing has that name, or it cannot be reached.
        InvalidRequest: A quant was given for a file that has one.
        ModelFileError: The file is damaged, or no config of a language model.
        Unauthorized: The repository wants a login or an accepted licence.
        Unsupported: There is no template of the architecture, or none in the quant's form.
    """
    if not reference.strip():
        raise NotFound(f"no model was named; give {DESCRIBED_FORMS}")
    if reference.startswith("hf:"):
        repo_id, quant = repository_and_quant(reference, quant)
        return repo_id.partition("/")[2], _on_hub(hub or Hub(), repo_id, quant)
    is_address = reference.startswith(("http://", "https://"))
    is_file = is_address or reference.lower().endswith(".gguf")
    if quant is not None and (is_file or reference == "demo"):
        raise _has_its_quant(reference)
    if is_address:
        files, names = files_at(reference)
        with files:
            return model_stem(names[0]).lower(), clone_remote(files, names)
    if reference == "demo":
        return _of_file(DEMO_PATH)
    path, quant = path_and_quant(reference, quant)
    if path is None and is_file:
        raise NotFound(f"there is no file '{reference:.200}'; check the path")
    if path is None:
        entry, quant = catalogue.find(reference, quant)
        return entry.name, _of_entry(entry, quant)
    return _at_path(path, quant)


def _at_path(path: Path, quant: str | None) -> tuple[str, Buildable]:
    if path.is_dir():
        if (file := gguf_in(path, quant)) is not None:
            return _of_file(file)
        path = path / "config.json"
        if not path.is_file():
            raise NotFound(f"{path.parent} is a directory without models; give {DESCRIBED_FORMS}")
    elif path.suffix.lower() != ".json":
        if quant is not None:
            raise _has_its_quant(str(path))
        return _of_file(path)
    name = name_of_config(path)
    return name, _from_config(read_json(path), quant or DEFAULT_QUANT, name)


def _has_its_quant(reference: str) -> InvalidRequest:
    return InvalidRequest(
        f"{reference:.200} has its quant; leave --quant out, or name a config.json", param="quant"
    )


def _of_file(path: Path) -> tuple[str, Blueprint]:
    return model_stem(path.name).lower(), clone_blueprint(path)


def _of_entry(entry: CatalogueEntry, quant: str) -> Buildable:
    try:
        return _from_config(entry.config, quant, entry.name)
    except Unsupported as exc:
        if quant not in entry.gguf_quants:
            raise
        raise Unsupported(f"{exc.message}; give {entry.pull_name(quant)}") from exc


def _on_hub(hub: Hub, repo_id: str, quant: str | None) -> Buildable:
    """A repository's GGUF file, or its config where it has none."""
    with hub.locate(repo_id, quant) as found:
        if isinstance(found, Path):
            return clone_blueprint(found)
        if found.gguf:
            return clone_remote(found.files, found.gguf)
        config = remote_json(found.files, "config.json")
    return _from_config(config, quant or DEFAULT_QUANT, f"hf:{repo_id}")


def _from_config(config: dict[str, Any], quant: str, name: str) -> Buildable:
    """The form is the quant's: a GGUF file, or a directory for MLX."""
    packing, dimensions = parse_quant(quant), dimensions_from_config(config, name)
    if isinstance(packing, MlxQuant):
        model = CheckpointModel(dimensions, packing.name)
        model.checkpoint()  # says now what has no such form
        return model
    return blueprint(dimensions, quant)
