"""From what a user types to a `ModelSpec`: paths, the built-in models, and the Hugging Face hub."""

import os
import shlex
from pathlib import Path

import msgspec

from brim.core.model import ModelSpec
from brim.errors import BrimError, InvalidRequest, NotFound
from brim.registry.describe import describe_gguf, model_stem
from brim.registry.hub import REPOSITORY, Hub

DEMO_PATH = Path(__file__).parent / "data" / "demo.gguf"
"""The small model that comes with brim; docs/demo-model.md says what it is."""

FORMS = "the path of a .gguf file, demo, or hf:ORG/REPO[:QUANT]"

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


def list_local(hub: Hub | None = None) -> list[LocalModel]:
    """The demo model and every GGUF model in the hub's cache, damaged ones with the reason.

    Reads headers only, asks nobody.
    """
    found = [_described("demo", DEMO_PATH, "demo")]
    for repo_id, path in (hub or Hub()).cached_files():
        found.append(_described(f"hf:{repo_id}:{model_stem(path.name)}", path, None))
    return found


def _fetch(reference: str, hub: Hub) -> Path:
    repo_id, _, quant = reference.removeprefix("hf:").partition(":")
    if not REPOSITORY.fullmatch(repo_id):
        raise NotFound(f"'{reference}' is not of the form hf:ORG/REPO[:QUANT]; give {FORMS}")
    return hub.fetch(repo_id, quant or None)


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
