import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.models import PYSTD_1M

from brim.errors import BrimError, InvalidRequest, ModelFileError, NotFound
from brim.registry.hub import Hub
from brim.registry.sources import DEMO_PATH, list_local, resolve

WriteLlama = Callable[..., Path]


class TestResolve:
    def test_demo(self) -> None:
        """The embedded model comes with the package and is called demo."""
        spec = resolve("demo")
        assert (spec.name, spec.paths, spec.quant) == ("demo", (str(DEMO_PATH),), "Q8_0")

    def test_toy(self) -> None:
        """The engine without weights has a specification without files."""
        spec = resolve("toy")
        assert (spec.format, spec.architecture, spec.fingerprint) == ("toy", "toy", "toy")
        assert (spec.vocab_size, spec.num_layers, spec.weights_bytes) == (260, 1, 0)
        assert spec.paths == ()

    @pytest.mark.parametrize("reference", ["demo", "toy"])
    def test_another_name(self, reference: str) -> None:
        """The caller decides what a model is called."""
        assert resolve(reference, name="mine").name == "mine"

    def test_path(self, write_llama: WriteLlama) -> None:
        """A path is described where it is."""
        path = write_llama()
        assert resolve(str(path)).paths == (str(path),)

    def test_home(self, write_llama: WriteLlama, monkeypatch: pytest.MonkeyPatch) -> None:
        """A leading tilde is the home directory, also where no shell has seen it."""
        path = write_llama()
        monkeypatch.setenv("HOME", str(path.parent))
        assert resolve(f"~/{path.name}").paths == (str(path),)

    def test_a_file_of_another_suffix_is_read_all_the_same(self, write_llama: WriteLlama) -> None:
        """What counts is what the file holds: blobs of other runtimes have no suffix."""
        path = write_llama(name="sha256-0123")
        assert resolve(str(path)).architecture == "llama"

    @pytest.mark.parametrize("reference", ["llama3", "", "demo2", "nowhere/at/all"])
    def test_unknown(self, reference: str) -> None:
        """An unknown word is NotFound and names the three forms."""
        with pytest.raises(NotFound) as caught:
            resolve(reference)
        for form in (".gguf", "demo", "hf:ORG/REPO[:QUANT]"):
            assert form in caught.value.message

    def test_a_repository_without_its_prefix(self) -> None:
        """What looks like a repository is offered with the prefix."""
        with pytest.raises(NotFound, match="did you mean hf:org/model"):
            resolve("org/model")

    @pytest.mark.parametrize("reference", ["hf:", "hf:model", "hf:a/b/c", "hf:a b/c:Q8_0"])
    def test_malformed_repository(self, reference: str) -> None:
        """A hub reference of another shape is refused before anything is asked."""
        with pytest.raises(NotFound, match="not of the form hf:ORG/REPO"):
            resolve(reference)

    def test_missing_file(self, tmp_path: Path) -> None:
        """A path with nothing there is NotFound by that path."""
        with pytest.raises(NotFound, match=r"none\.gguf"):
            resolve(str(tmp_path / "none.gguf"))

    def test_directory_with_models(self, write_llama: WriteLlama) -> None:
        """A directory is refused with a file in it as the example."""
        path = write_llama()
        with pytest.raises(InvalidRequest, match=path.name):
            resolve(str(path.parent))

    def test_checkpoint(self) -> None:
        """A safetensors directory is refused with the command that converts it."""
        advice = f"brim convert {shlex.quote(str(PYSTD_1M))} pystd-1m.gguf"
        with pytest.raises(InvalidRequest, match=f"{re.escape(advice)}$"):
            resolve(str(PYSTD_1M))

    @pytest.mark.parametrize("reference", ["", "  "])
    def test_no_name_at_all(self, reference: str) -> None:
        """An empty name, as from an unset variable, is said to be none."""
        with pytest.raises(NotFound, match="no model was named"):
            resolve(reference)

    @pytest.mark.skipif(sys.platform == "darwin", reason="its file systems take UTF-8 names only")
    def test_a_path_that_is_no_text(self, write_llama: WriteLlama) -> None:
        """A path with a byte that is no UTF-8 is refused by name: no worker could be sent it."""
        path = write_llama(name=os.fsdecode(b"S\xe3o.gguf"))
        with pytest.raises(InvalidRequest, match=r"S\\xe3o\.gguf is not UTF-8; rename"):
            resolve(str(path))

    def test_empty_directory(self, tmp_path: Path) -> None:
        """A directory with no model in it is refused as such."""
        with pytest.raises(InvalidRequest, match="without models"):
            resolve(str(tmp_path))

    def test_damaged_file(self, tmp_path: Path) -> None:
        """A damaged file is told apart from a missing one."""
        (tmp_path / "x.gguf").write_bytes(b"nothing")
        with pytest.raises(ModelFileError):
            resolve(str(tmp_path / "x.gguf"))


def cached(cache: Path, repository: str, commit: str, name: str) -> Path:
    """Where the hub's cache has a file of one revision."""
    path = cache / f"models--{repository.replace('/', '--')}" / "snapshots" / commit / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


class TestListLocal:
    def test_an_empty_cache(self, tmp_path: Path) -> None:
        """The demo is always there, with or without a cache."""
        found = list_local(Hub(cache_dir=tmp_path / "none"))
        assert [model.reference for model in found] == ["demo"]
        assert found[0].spec is not None

    def test_cached_models(self, tmp_path: Path, write_llama: WriteLlama) -> None:
        """Cached files are described and come with the reference that resolves to them."""
        write_llama().rename(cached(tmp_path, "org/one", "c1", "One-Q8_0.gguf"))
        found = list_local(Hub(cache_dir=tmp_path))
        assert [model.reference for model in found] == ["demo", "hf:org/one:One-Q8_0"]
        assert found[1].spec is not None
        assert found[1].spec.name == "one-q8_0"

    def test_damaged_models_are_listed_with_the_reason(self, tmp_path: Path) -> None:
        """A file that cannot be used does not hide the others, nor itself."""
        cached(tmp_path, "org/bad", "c1", "bad.gguf").write_bytes(b"GGUF")
        cached(tmp_path, "org/gone", "c1", "gone.gguf").symlink_to(tmp_path / "nothing")
        bad, gone = list_local(Hub(cache_dir=tmp_path))[1:]
        assert bad.spec is None
        assert "cut short" in bad.problem
        assert gone.spec is None
        assert "gone.gguf" in gone.problem

    def test_only_the_current_revision(self, tmp_path: Path, write_llama: WriteLlama) -> None:
        """Of two cached revisions the one that main names is listed, or else the newest."""
        for age, commit in enumerate(["new", "old"]):
            path = write_llama().rename(cached(tmp_path, "org/one", commit, f"{commit}.gguf"))
            os.utime(path.parent, (1000 - age, 1000 - age))
        hub = Hub(cache_dir=tmp_path)
        assert [path.name for _, path in hub.cached_files()] == ["new.gguf"]
        ref = tmp_path / "models--org--one" / "refs" / "main"
        ref.parent.mkdir()
        ref.write_text("old")
        assert [path.name for _, path in hub.cached_files()] == ["old.gguf"]

    def test_one_entry_for_a_split_model_and_none_for_its_projector(self, tmp_path: Path) -> None:
        """Parts after the first and files that are no language models are left out."""
        for name in ("x-00001-of-00002.gguf", "x-00002-of-00002.gguf", "mmproj-x.gguf"):
            cached(tmp_path, "org/x", "c1", name).touch()
        found = Hub(cache_dir=tmp_path).cached_files()
        assert [(repo, path.name) for repo, path in found] == [("org/x", "x-00001-of-00002.gguf")]


def test_importing_the_registry_does_not_import_the_hub() -> None:
    """Start-up does not pay for huggingface_hub, gguf or numpy until they are needed."""
    code = (
        "import sys, brim.registry.sources\n"
        "print({'huggingface_hub', 'gguf', 'numpy', 'httpx2'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_errors_are_brim_errors(tmp_path: Path) -> None:
    """Whatever a user types ends in a model or in a BrimError."""
    (tmp_path / "no.gguf").write_bytes(b"\0" * 100)
    for reference in (
        "\0",
        "/",
        ".",
        "~",
        "~nobody-here",
        "x" * 5000,
        "x" * 300 + ".gguf",
        "hf:\n/a",
        str(tmp_path / "no.gguf"),
    ):
        with pytest.raises(BrimError):
            resolve(reference)
