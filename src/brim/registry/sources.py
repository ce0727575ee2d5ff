"""From what a user types to a `ModelSpec`: paths, the built-in models, and the Hugging Face hub.

`forms_of` gives the forms in which a model is at hand; `resolve` gives one that can be loaded, and
downloads it where it must; `describe` gives what can be known without that.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from brim.core.model import ModelSpec
from brim.errors import BrimError, InvalidRequest, NotFound
from brim.registry.describe import describe_gguf, model_stem
from brim.registry.describe_safetensors import describe_directory
from brim.registry.forms import (
    Form,
    catalogue_forms,
    checkpoint_form,
    config_form,
    directory_forms,
    file_form,
    first_of,
    repository_forms,
)
from brim.registry.forms import gguf_in as gguf_in
from brim.registry.forms import name_of_config as name_of_config
from brim.registry.hub import REPOSITORY, Hub

DEMO_PATH = Path(__file__).parent / "data" / "demo.gguf"
"""The small model that comes with brim; docs/demo-model.md says what it is."""

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

    Of a model that is here in several forms the first of `forms.FORMATS` is taken.

    Args:
        reference: The path of a .gguf file or of a model's directory, `demo`, `toy`,
            `hf:ORG/REPO[:QUANT]`, or a model of the catalogue.
        name: What clients will call it; by default what it is called where it lies, lower-cased.
        hub: Another hub or cache than the environment names.

    Raises:
        NotFound: Nothing has that name.
        ModelFileError: The file is damaged, incomplete or of another kind.
        InvalidRequest: An unclear quant was named, or a path that is no text.
        BrimError: What `Hub.look` and a transfer raise.
    """
    return first_of(forms_of(reference, name=name, hub=hub)).fetch()


def describe(
    reference: str, *, quant: str | None = None, name: str | None = None, hub: Hub | None = None
) -> ModelSpec:
    """What is known of a model without loading or downloading it.

    Args:
        reference: As for `forms_of`.
        quant: As for `forms_of`.
        name: What clients will call it.
        hub: Another hub or cache than the environment names.

    Raises:
        BrimError: As `forms_of`, and where a header cannot be read or is damaged.
    """
    return first_of(forms_of(reference, quant=quant, name=name, hub=hub)).describe()


def forms_of(
    reference: str, *, quant: str | None = None, name: str | None = None, hub: Hub | None = None
) -> tuple[Form, ...]:
    """The forms in which a model is at hand, at least one.

    Args:
        reference: As for `resolve`; to be described and not loaded, also a config.json or a
            directory with one (both may have `:QUANT` behind them), or the address of a GGUF file.
            Of a repository or an address only headers are fetched.
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
        return repository_forms(repo_id, quant, name, hub or Hub())
    path, quant = path_and_quant(reference, quant)
    if path is not None and path.is_dir():
        return directory_forms(path, quant, name)
    if path is not None and path.suffix.lower() == ".json":
        return (config_form(path, quant, name),)
    if path is not None and path.suffix.lower() == ".safetensors":
        return (checkpoint_form(path.parent, quant, name),)
    is_address = reference.startswith(("http://", "https://"))
    is_file = path is not None or reference.lower().endswith(".gguf")
    if is_address or is_file or reference in ("toy", "demo"):
        if quant is not None:
            raise InvalidRequest(
                f"{reference:.200} has its own quant; leave {quant} out, or name a config.json"
            )
        return (_single_form(reference, path, name),)
    try:
        return catalogue_forms(reference, quant, name, lambda: hub or Hub())
    except NotFound as exc:
        meant = f" (did you mean hf:{reference}?)" if REPOSITORY.fullmatch(reference) else ""
        raise NotFound(
            f"there is no model '{reference:.100}'{meant}: {exc.message}; give {DESCRIBED_FORMS}"
        ) from exc


def _single_form(reference: str, path: Path | None, name: str | None) -> Form:
    """A model that exists in one form alone."""
    if reference == "toy":
        toy = msgspec.structs.replace(TOY, name=name or TOY.name)
        return Form("toy", lambda: toy, lambda: toy)
    if reference == "demo":
        return file_form(DEMO_PATH, name or "demo")
    if reference.startswith(("http://", "https://")):
        return Form(
            "gguf", lambda: _describe_address(reference, name), lambda: _not_here(reference)
        )
    return file_form(path or Path(reference).expanduser(), name)


def _not_here(address: str) -> ModelSpec:
    shown = address.partition("?")[0].rpartition("@")[2]  # a password is not shown
    raise InvalidRequest(f"{shown:.200} is not on this machine; download it and name the file")


def list_local(hub: Hub | None = None) -> list[LocalModel]:
    """The demo model and every model in the hub's cache, damaged ones with the reason.

    Reads headers only, asks nobody.
    """
    hub = hub or Hub()
    found = [_described("demo", DEMO_PATH, lambda: describe_gguf(DEMO_PATH, "demo"))]
    for repo_id, path in hub.cached_files():
        reference = f"hf:{repo_id}:{model_stem(path.name)}"
        found.append(_described(reference, path, functools.partial(describe_gguf, path)))
    for repo_id, directory in hub.cached_checkpoints():
        name = repo_id.rpartition("/")[2].lower()
        read = functools.partial(describe_directory, directory, name=name)
        found.append(_described(f"hf:{repo_id}", directory, read))
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


def repository_and_quant(reference: str, quant: str | None) -> tuple[str, str | None]:
    """The repository that `hf:ORG/REPO[:QUANT]` names, and the quant asked for.

    Raises:
        NotFound: It is not of that form.
        InvalidRequest: It has another quant behind it than `quant`.
    """
    repo_id, _, selected = reference.removeprefix("hf:").partition(":")
    if not REPOSITORY.fullmatch(repo_id):
        raise NotFound(
            f"'{reference:.100}' is not of the form hf:ORG/REPO[:QUANT]; give {DESCRIBED_FORMS}"
        )
    if selected and quant and selected.lower() != quant.lower():
        raise InvalidRequest(f"{reference} names a quant already; leave {quant} out")
    return repo_id, selected or quant


def _describe_address(address: str, name: str | None) -> ModelSpec:
    from brim.registry.remote import describe_gguf_at, files_at

    files, names = files_at(address)
    with files:
        return describe_gguf_at(files, names, name=name)


def _described(reference: str, path: Path, read: Callable[[], ModelSpec]) -> LocalModel:
    try:
        return LocalModel(reference=reference, path=os.fspath(path), spec=read())
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
