"""From what a user types to a `ModelSpec`: paths, the built-in models, and the Hugging Face hub.

`resolve` gives a model that can be loaded, and downloads it where it must; `describe` gives what
can be known without that, of models in any form.
"""

import os
import shlex
from pathlib import Path

import msgspec

from brim.core.model import ModelSpec
from brim.errors import BrimError, InvalidRequest, NotFound
from brim.registry.config_json import spec_from_config
from brim.registry.describe import describe_gguf, model_stem
from brim.registry.describe_safetensors import describe_directory
from brim.registry.hub import REPOSITORY, Hub
from brim.registry.hub_choice import HubFile, choose, has_gguf
from brim.registry.safetensors_header import has_safetensors, read_json

DEMO_PATH = Path(__file__).parent / "data" / "demo.gguf"
"""The small model that comes with brim; docs/demo-model.md says what it is."""

FORMS = "the path of a .gguf file, demo, or hf:ORG/REPO[:QUANT]"

DESCRIBED_FORMS = (
    "the path of a .gguf file, a model's directory or a config.json, demo, hf:ORG/REPO[:QUANT], "
    "or a model of the catalogue (brim recommend)"
)

TOY = ModelSpec(
    name="toy",
    paths=(),
    format="toy",
    architecture="toy",
    fingerprint="toy",
    num_parameters=0,
    weights_bytes=0,
    num_layers=1,
    hidden_size=2,
    num_heads=1,
    num_kv_heads=(1,),
    # Two f16 keys and two f16 values a token are the 8 bytes that the toy engine's cell takes.
    key_dim=2,
    value_dim=2,
    vocab_size=260,
    trained_context_tokens=8_192,
)
"""The engine without weights, for learning and testing."""


class LocalModel(msgspec.Struct, frozen=True, kw_only=True):
    """One model on this machine; either `spec` or `problem` is set."""

    reference: str
    """What `resolve` takes."""
    path: str
    spec: ModelSpec | None = None
    problem: str = ""
    """Why the file cannot be used."""


def resolve(reference: str, *, name: str | None = None, hub: Hub | None = None) -> ModelSpec:
    """The model that `reference` names; one from the hub is downloaded unless it is cached.

    Args:
        reference: The path of a .gguf file, `demo`, `toy`, or `hf:ORG/REPO[:QUANT]`.
        name: What clients will call it; by default `demo`, `toy` or the lower-cased file stem.
        hub: Another hub or cache than the environment names.

    Raises:
        NotFound: Nothing has that name.
        ModelFileError: The file is damaged, incomplete or of another kind.
        InvalidRequest: A directory or an unclear quant was named, or a path that is no text.
        BrimError: What `Hub.fetch` raises.
    """
    if not reference.strip():
        raise NotFound(f"no model was named; give {FORMS}")
    if reference == "toy":
        return msgspec.structs.replace(TOY, name=name or TOY.name)
    if reference == "demo":
        return describe_gguf(DEMO_PATH, name=name or "demo")
    if reference.startswith("hf:"):
        return describe_gguf(_fetch(reference, hub or Hub()), name)
    try:
        path = Path(reference).expanduser()
        is_directory, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError) as exc:  # too long for a path, or no such user's home
        raise NotFound(f"there is no model '{reference:.80}' ({exc!s:.80}); give {FORMS}") from exc
    if is_directory or is_file:
        _check_is_text(path)
    if is_directory:
        raise InvalidRequest(_about_directory(path))
    if is_file or path.suffix.lower() == ".gguf":
        return describe_gguf(path, name)
    meant = f" (did you mean hf:{reference}?)" if REPOSITORY.fullmatch(reference) else ""
    raise NotFound(f"there is no model '{reference}'{meant}; give {FORMS}")


def describe(
    reference: str, *, quant: str | None = None, name: str | None = None, hub: Hub | None = None
) -> ModelSpec:
    """What is known of a model without loading or downloading it.

    Args:
        reference: As for `resolve`, or a directory with GGUF or safetensors files or a config.json
            (both may have `:QUANT` behind them), a model of the catalogue (`qwen3:8b`), or the
            address of a GGUF file.  Of a repository or an address only headers are fetched.
        quant: A quant's name: which file of a repository or directory is meant, or the quant that
            a config, a checkpoint without one or a model of the catalogue is planned in.
        name: What clients will call it.
        hub: Another hub or cache than the environment names.

    Raises:
        NotFound: Nothing has that name, or the hub cannot be reached.
        ModelFileError: A file is damaged, incomplete or of another kind.
        InvalidRequest: A quant is missing, unknown, or named for a file that has its own.
        Unauthorized: The repository wants a login or an accepted licence.
    """
    if not reference.strip():
        raise NotFound(f"no model was named; give {DESCRIBED_FORMS}")
    if reference.startswith("hf:"):
        repo_id, quant = repository_and_quant(reference, quant)
        return (hub or Hub()).describe(repo_id, quant, name)
    path, quant = path_and_quant(reference, quant)
    if path is not None and path.is_dir():
        return _describe_directory(path, quant, name)
    if path is not None and path.suffix.lower() == ".json":
        return _from_config(path, quant, name or name_of_config(path).lower())
    if path is not None and path.suffix.lower() == ".safetensors":
        return _describe_checkpoint(path.parent, quant, name)
    is_address = reference.startswith(("http://", "https://"))
    is_file = path is not None or reference.lower().endswith(".gguf")
    if is_address or is_file or reference in ("toy", "demo"):
        if quant is not None:
            raise InvalidRequest(
                f"{reference:.200} has its own quant; leave {quant} out, or name a config.json"
            )
        if is_address:
            return _describe_address(reference, name)
        return resolve(reference, name=name, hub=hub)
    return _from_catalogue(reference, quant, name)


def list_local(hub: Hub | None = None) -> list[LocalModel]:
    """The demo model and every GGUF model in the hub's cache, damaged ones with the reason.

    Reads headers only, asks nobody.
    """
    found = [_described("demo", DEMO_PATH, "demo")]
    for repo_id, path in (hub or Hub()).cached_files():
        found.append(_described(f"hf:{repo_id}:{model_stem(path.name)}", path, None))
    return found


def path_and_quant(reference: str, quant: str | None) -> tuple[Path | None, str | None]:
    """The file or directory that a user's word is the path of, and the quant asked for.

    Args:
        reference: A path, which may have `:QUANT` behind it where `quant` is None.
        quant: The one asked for already.

    Returns:
        None for the path, and `quant` as it was, where there is no such file or directory.

    Raises:
        InvalidRequest: A byte of the path is no UTF-8.
    """
    path = _existing(reference)
    if path is None and quant is None and ":" in reference:
        head, _, behind = reference.rpartition(":")
        if (path := _existing(head)) is not None:
            quant = behind
    return path, quant


def _existing(reference: str) -> Path | None:
    try:
        path = Path(reference).expanduser()
        exists = path.exists()
    except (OSError, RuntimeError, ValueError):  # no path at all
        return None
    if exists:
        _check_is_text(path)
    return path if exists else None


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


def _describe_directory(path: Path, quant: str | None, name: str | None) -> ModelSpec:
    if (file := gguf_in(path, quant)) is not None:
        return describe_gguf(file, name)
    if (path / "config.json").is_file():
        return _describe_checkpoint(path, quant, name)
    raise NotFound(f"{path} is a directory without models; give {DESCRIBED_FORMS}")


def _describe_checkpoint(model_dir: Path, quant: str | None, name: str | None) -> ModelSpec:
    if quant is None and has_safetensors(path.name for path in model_dir.iterdir()):
        return describe_directory(model_dir, name=name)
    config = model_dir / "config.json"
    return _from_config(config, quant, name or name_of_config(config).lower())


def _from_config(path: Path, quant: str | None, name: str) -> ModelSpec:
    if quant is None:
        raise InvalidRequest(
            f"{path} does not say which quant to plan for; name one behind it, as in "
            f"{path}:Q4_K_M or '{path}:MLX 4bit', or by --quant Q4_K_M"
        )
    return spec_from_config(read_json(path), quant=quant, name=name)


def _from_catalogue(reference: str, quant: str | None, name: str | None) -> ModelSpec:
    from brim.registry.catalogue import find

    try:
        entry, quant = find(reference, quant)
    except NotFound as exc:
        meant = f" (did you mean hf:{reference}?)" if REPOSITORY.fullmatch(reference) else ""
        raise NotFound(
            f"there is no model '{reference:.100}'{meant}: {exc.message}; give {DESCRIBED_FORMS}"
        ) from exc
    return entry.spec(quant, name or entry.name.lower())


def repository_and_quant(reference: str, quant: str | None) -> tuple[str, str | None]:
    """The repository that `hf:ORG/REPO[:QUANT]` names, and the quant asked for.

    Raises:
        NotFound: It is not of that form.
        InvalidRequest: It has another quant behind it than `quant`.
    """
    repo_id, _, selected = reference.removeprefix("hf:").partition(":")
    if not REPOSITORY.fullmatch(repo_id):
        raise NotFound(f"'{reference:.100}' is not of the form hf:ORG/REPO[:QUANT]; give {FORMS}")
    if selected and quant and selected.lower() != quant.lower():
        raise InvalidRequest(f"{reference} names a quant already; leave {quant} out")
    return repo_id, selected or quant


def _describe_address(address: str, name: str | None) -> ModelSpec:
    from brim.registry.remote import describe_gguf_at, files_at

    files, names = files_at(address)
    with files:
        return describe_gguf_at(files, names, name=name)


def _fetch(reference: str, hub: Hub) -> Path:
    return hub.fetch(*repository_and_quant(reference, None))


def _described(reference: str, path: Path, name: str | None) -> LocalModel:
    try:
        return LocalModel(reference=reference, path=os.fspath(path), spec=describe_gguf(path, name))
    except BrimError as exc:
        return LocalModel(reference=reference, path=os.fspath(path), problem=exc.message)


def _check_is_text(path: Path) -> None:
    """Refuse a path that cannot be sent to a worker or shown in JSON, both of which are UTF-8.

    Raises:
        InvalidRequest: A byte of it is no UTF-8.
    """
    whole = os.fspath(path.absolute())
    try:
        whole.encode()
    except UnicodeEncodeError as exc:
        shown = os.fsencode(whole).decode("utf-8", "backslashreplace")
        raise InvalidRequest(f"the path {shown} is not UTF-8; rename or link it") from exc


def _about_directory(path: Path) -> str:
    if models := sorted(path.glob("*.gguf")):
        return f"{path} is a directory; name the file in it, for example {models[0]}"
    if (path / "config.json").is_file():
        out = f"{path.resolve().name}.gguf"
        command = f"brim convert {shlex.quote(str(path))} {shlex.quote(out)}"
        return f"{path} is a safetensors model; convert it first: {command}"
    return f"{path} is a directory without models; give {FORMS}"
