"""From what a user types to the blueprint of a stand-in: a GGUF file, a config, a name."""

from pathlib import Path
from typing import Any

from brim.bench.standin.blueprint import Blueprint
from brim.bench.standin.clone import clone_blueprint, clone_remote
from brim.bench.standin.config import dimensions_from_config
from brim.bench.standin.templates import blueprint
from brim.errors import InvalidRequest, NotFound
from brim.registry import catalogue
from brim.registry.describe import model_stem
from brim.registry.hub import Hub
from brim.registry.hub_choice import choose
from brim.registry.remote import RemoteFiles, names_of_parts, remote_json, split_address
from brim.registry.safetensors_header import read_json
from brim.registry.sources import DEMO_PATH

DEFAULT_QUANT = "Q4_K_M"
"""What most people load: half a byte a weight, at little loss."""


def standin_of(reference: str, quant: str | None = None) -> tuple[str, Blueprint]:
    """The name and blueprint of the model that `reference` names.

    Args:
        reference: A .gguf file or its address, hf:ORG/REPO[:QUANT], a config.json or the directory
            that it is in, a name of the catalogue, or `demo`.  Of what is remote only headers are
            fetched.
        quant: For a config or a name, or to choose among a repository's files; a GGUF file has
            its own.

    Raises:
        NotFound: Nothing has that name, or it cannot be reached.
        InvalidRequest: A quant was given for a file that has one.
        ModelFileError: The file is damaged, or no config of a language model.
        Unauthorized: The repository wants a login or an accepted licence.
        Unsupported: There is no template of the architecture.
    """
    if reference.startswith("hf:"):
        repo_id, _, selected = reference.removeprefix("hf:").partition(":")
        return repo_id.partition("/")[2], _HeaderHub().clone(repo_id, selected or quant)
    is_address = reference.startswith(("http://", "https://"))
    if quant is not None and (reference == "demo" or reference.lower().endswith(".gguf")):
        raise InvalidRequest(
            f"{reference} has its quant; leave --quant out, or name a config.json", param="quant"
        )
    if is_address:
        base, file_name = split_address(reference)
        with RemoteFiles(base.rstrip("/"), base) as files:
            return model_stem(file_name).lower(), clone_remote(files, names_of_parts(file_name))
    return _at_hand(reference, quant)


def _at_hand(reference: str, quant: str | None) -> tuple[str, Blueprint]:
    path = DEMO_PATH if reference == "demo" else Path(reference).expanduser()
    if path.suffix.lower() == ".gguf":
        return model_stem(path.name).lower(), clone_blueprint(path)
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise NotFound(f"{path.parent} has no config.json; name a .gguf file in it")
    if path.is_file():
        name = path.resolve().parent.name if path.name == "config.json" else path.stem
        return name, _from_config(read_json(path), quant or DEFAULT_QUANT, name)
    entry, meant = catalogue.find(reference)
    return entry.name, _from_config(entry.config, quant or meant, entry.name)


class _HeaderHub(Hub):
    """The hub, of which only headers and configs are wanted."""

    def clone(self, repo_id: str, quant: str | None) -> Blueprint:
        """The blueprint of a repository's GGUF file, or of its config where it has none."""
        found = self._find(repo_id, quant)
        if isinstance(found, Path):
            return clone_blueprint(found)
        commit, files = found
        with self._remote(repo_id, commit) as source:
            if not any(file.name.lower().endswith(".gguf") for file in files):
                config = remote_json(source, "config.json")
                return _from_config(config, quant or DEFAULT_QUANT, f"hf:{repo_id}")
            parts = [file.name for file in choose(files, quant, f"hf:{repo_id}")]
            if cached := self._cached(repo_id, parts, commit):
                return clone_blueprint(cached)
            return clone_remote(source, parts)


def _from_config(config: dict[str, Any], quant: str, name: str) -> Blueprint:
    return blueprint(dimensions_from_config(config, name), quant)
