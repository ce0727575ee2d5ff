import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.models import PYSTD_1M

from brim.errors import BrimError, InvalidRequest, ModelFileError, NotFound
from brim.registry.hub import Hub
from brim.registry.remote import names_of_parts
from brim.registry.sources import DEMO_PATH, describe, forms_of, list_local, resolve

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
        """A directory with one GGUF model is that model, also by its quant."""
        path = write_llama()
        assert resolve(str(path.parent)).paths == (str(path),)
        assert resolve(f"{path.parent}:{path.stem}").paths == (str(path),)
        with pytest.raises(NotFound, match="has no quant Q2_K; it has"):
            resolve(f"{path.parent}:Q2_K")

    def test_a_gguf_model_with_its_config(self, write_llama: WriteLlama) -> None:
        """A config beside a GGUF file, as publishers put it there, changes nothing."""
        path = write_llama()
        shutil.copy(PYSTD_1M / "config.json", path.parent)
        assert resolve(str(path.parent)).paths == (str(path),)

    def test_two_forms_in_one_directory(self, checkpoint: Path) -> None:
        """Both are one model, which clients call the same whichever engine takes it."""
        shutil.copy(DEMO_PATH, checkpoint / "demo-Q8_0.gguf")
        found = {form.format: form.fetch().name for form in forms_of(str(checkpoint))}
        assert found == dict.fromkeys(("gguf", "safetensors"), checkpoint.name.lower())
        assert {form.fetch().name for form in forms_of(str(checkpoint), name="x")} == {"x"}
        assert resolve(f"{checkpoint}:Q8_0").name == "demo-q8_0"

    def test_checkpoint(self) -> None:
        """A safetensors directory is a model, named by its directory or by one of its files."""
        spec = resolve(str(PYSTD_1M))
        assert (spec.format, spec.name) == ("safetensors", "pystd-1m")
        assert spec.paths == (str(PYSTD_1M / "model.safetensors"),)
        assert resolve(spec.paths[0]) == spec

    def test_a_checkpoint_in_a_quant_that_it_has_not(self) -> None:
        """A quant of a checkpoint can be planned; to load it, it must be made first."""
        reference = f"{PYSTD_1M}:Q8_0"
        assert describe(reference).quant == "Q8_0"
        advice = f"brim convert {shlex.quote(str(PYSTD_1M))} pystd-1m.gguf --quant Q8_0"
        with pytest.raises(InvalidRequest, match=f"no weights in Q8_0; .*{re.escape(advice)}$"):
            resolve(reference)

    @pytest.mark.parametrize("quant", ["Q4_K_M", "MLX 4bit"])
    def test_a_quant_that_brim_cannot_make(self, quant: str) -> None:
        """Converting is not offered for a quant that `brim convert` does not write."""
        with pytest.raises(InvalidRequest, match=f"in {quant}; leave {quant} out to load what is"):
            resolve(f"{PYSTD_1M}:{quant}")

    def test_a_checkpoint_without_its_weights(self, tmp_path: Path) -> None:
        """A config alone is planned in a quant, and cannot be loaded."""
        shutil.copy(PYSTD_1M / "config.json", tmp_path)
        with pytest.raises(InvalidRequest, match=r"no model\.safetensors; bring the weights there"):
            resolve(str(tmp_path))
        with pytest.raises(InvalidRequest, match="no weights in Q8_0; name a directory or a repo"):
            resolve(f"{tmp_path}:Q8_0")

    def test_weights_that_a_cache_lost(self, tmp_path: Path) -> None:
        """A link whose file was deleted is told apart from a directory that never had weights."""
        shutil.copy(PYSTD_1M / "config.json", tmp_path)
        (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
        with pytest.raises(ModelFileError, match="links to a file that is gone; download it again"):
            resolve(str(tmp_path))

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
        with pytest.raises(NotFound, match="without models"):
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


class TestDescribe:
    def test_a_directory_of_several_models_says_how_to_name_one(
        self, tmp_path: Path, write_llama: WriteLlama
    ) -> None:
        """Two files in one quant are listed with the ways to name one, which then work."""
        for name in ("a-Q8_0.gguf", "b-Q8_0.gguf", "c-Q4_0.gguf"):
            write_llama(name=name)
        with pytest.raises(InvalidRequest, match=r"b-Q8_0\.gguf; name one as DIRECTORY:QUANT or"):
            describe(str(tmp_path), quant="Q8_0")
        with pytest.raises(NotFound, match=r"no quant Q6_K; it has a-Q8_0\.gguf"):
            describe(f"{tmp_path}:Q6_K")
        assert describe(f"{tmp_path}:Q4_0").name == "c-q4_0"
        assert describe(f"{tmp_path}:b-Q8_0.gguf").name == "b-q8_0"

    def test_a_projector_is_no_model(self, checkpoint: Path) -> None:
        """A checkpoint with a GGUF projector beside it is described as the checkpoint."""
        (checkpoint / "mmproj-F16.gguf").write_bytes(b"")
        assert describe(str(checkpoint)).format == "safetensors"

    def test_the_file_that_is_named_is_described(self, checkpoint: Path) -> None:
        """A checkpoint's file means the checkpoint, whatever lies beside it."""
        shutil.copy(DEMO_PATH, checkpoint / "demo-Q8_0.gguf")
        assert describe(str(checkpoint)).format == "gguf"
        assert describe(str(checkpoint / "model.safetensors")).format == "safetensors"

    def test_a_config_without_weights(self, checkpoint: Path) -> None:
        """A directory with a config alone asks for a quant to plan for, and takes it."""
        (checkpoint / "model.safetensors").unlink()
        with pytest.raises(InvalidRequest, match=f"as in {re.escape(str(checkpoint))}:Q4_K_M"):
            describe(str(checkpoint))
        assert describe(f"{checkpoint}:Q8_0").is_estimated

    @pytest.mark.parametrize(
        ("reference", "says"),
        [
            ("https://[x/y.gguf", "no address of a .gguf file"),
            ("https:///y.gguf", "no address of a .gguf file"),
            ("https://host/x-00001-of-00000.gguf", "numbered 1 of 0; rename the parts"),
            ("https://host/x-00003-of-00002.gguf", "numbered 3 of 2; rename the parts"),
            ("https://host/x-00001-of-99999.gguf", "numbered 1 of 99999; rename the parts"),
        ],
    )
    def test_addresses_of_nothing(self, reference: str, says: str) -> None:
        """An address that cannot be a model's is refused before anybody is asked."""
        with pytest.raises(BrimError) as caught:
            describe(reference)
        assert says in caught.value.message

    @pytest.mark.parametrize("reference", ["https://host/x.gguf", "demo", "qwen3:8b-q8_0"])
    def test_one_quant_only(self, reference: str) -> None:
        """A second quant is refused, not passed over, where the model has or names its own."""
        with pytest.raises(InvalidRequest, match="leave Q6_K out"):
            describe(reference, quant="Q6_K")

    def test_the_same_quant_twice(self) -> None:
        """A quant may be said again, in any case."""
        assert describe("qwen3:8b-q8_0", quant="q8_0").quant == "Q8_0"

    @pytest.mark.parametrize(
        ("name", "context_tokens"),
        [
            ("Devstral-Small-2-24B-Instruct-2512", 262_144),
            ("LFM2.5-1.2B-Instruct", 32_768),
            ("bge-m3", 8_192),
            ("Qwen3-8B", 40_960),
        ],
    )
    def test_the_publisher_s_context(self, name: str, context_tokens: int) -> None:
        """A catalogue's model has the context that its publisher states, not its config's room."""
        assert describe(name).trained_context_tokens == context_tokens


def test_parts_of_a_remote_file() -> None:
    """A thousand parts are believed, a file without a number is its own only part."""
    assert len(names_of_parts("x-00001-of-01000.gguf")) == 1000
    assert names_of_parts("x.gguf") == ["x.gguf"]


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
