"""Safetensors models from a hub that runs here: what is fetched, what never is, and offline use."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from support.checkpoints import PART_ONE, PART_TWO, in_two_parts
from support.hub_server import COMMIT, DEMO, FakeHub, running_hub
from support.models import PYSTD_1M

from brim.errors import BrimError, DoesNotFit, ModelFileError, NotFound
from brim.registry import hub_choice, hub_transfer
from brim.registry.hub import Hub
from brim.registry.sources import describe, forms_of, list_local, resolve

PYSTD = {path.name: path.read_bytes() for path in PYSTD_1M.iterdir() if path.is_file()}
BESIDE = {
    "README.md": b"a model",
    "modeling_evil.py": b"raise SystemExit",
    "pytorch_model.bin": b"\x80\x04",
    "original/model.safetensors": b"another layout",
    "consolidated.safetensors": b"another layout",
    "onnx/model.onnx": b"another format",
}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with the 1 M model and what publishers put beside one."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    with running_hub() as fake:
        fake.files = fake.published = {**PYSTD, **BESIDE}
        yield fake


@pytest.fixture
def hub(server: FakeHub, tmp_path: Path) -> Hub:
    return Hub(endpoint=server.endpoint, cache_dir=tmp_path / "cache")


def snapshot(hub: Hub) -> Path:
    return hub.cache_dir / "models--org--demo" / "snapshots" / COMMIT


def refused(hub: Hub, kind: type[BrimError]) -> str:
    """The sentence with which the repository is refused."""
    with pytest.raises(kind) as caught:
        resolve("hf:org/demo", hub=hub)
    return caught.value.message


def test_a_checkpoint_arrives_without_what_is_beside_it(server: FakeHub, hub: Hub) -> None:
    """Weights, config and tokenizer come into the cache; no code and no other form is asked for."""
    spec = resolve("hf:org/demo", hub=hub)
    assert (spec.name, spec.format) == ("demo", "safetensors")
    assert spec.paths == (str(snapshot(hub) / "model.safetensors"),)
    assert spec.fingerprint == resolve(str(PYSTD_1M)).fingerprint
    arrived = {path.name: path.read_bytes() for path in snapshot(hub).iterdir()}
    assert arrived == {
        name: data for name, data in PYSTD.items() if name in hub_choice.CHECKPOINT_FILES
    } | {"model.safetensors": PYSTD["model.safetensors"]}
    asked = {path.rpartition("/")[2] for _, path, _ in server.requests if "/resolve/" in path}
    assert asked <= arrived.keys()


def test_a_second_time_nothing_is_transferred(server: FakeHub, hub: Hub) -> None:
    """A cached checkpoint is used after one question for what is current."""
    first = resolve("hf:org/demo", hub=hub)
    server.requests.clear()
    assert resolve("hf:org/demo", hub=hub) == first
    assert describe("hf:org/demo", hub=hub) == first
    assert [path for _, path, _ in server.requests] == ["/api/models/org/demo"] * 2


def test_parts_come_by_their_index(server: FakeHub, hub: Hub) -> None:
    """All parts that the index names are brought, and no other weights."""
    server.files = server.published = {**in_two_parts(PYSTD), **BESIDE}
    spec = resolve("hf:org/demo", hub=hub)
    assert [Path(path).name for path in spec.paths] == [PART_ONE, PART_TWO]
    assert spec.weights_bytes == resolve(str(PYSTD_1M)).weights_bytes
    assert not (snapshot(hub) / "consolidated.safetensors").exists()


@pytest.mark.parametrize("part", ["../evil.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_an_index_does_not_reach_elsewhere(server: FakeHub, hub: Hub, part: str) -> None:
    """A part that is not a file beside its index is refused before it is asked for."""
    index = json.dumps({"weight_map": {"x": part}}).encode()
    files = {**in_two_parts(PYSTD), "model.safetensors.index.json": index}
    server.files = server.published = files
    assert "not a file beside it" in refused(hub, ModelFileError)
    assert not [path for _, path, _ in server.requests if "evil" in path or "passwd" in path]


def test_a_part_that_the_repository_lacks(server: FakeHub, hub: Hub) -> None:
    """A missing part is named before gigabytes of the others are brought."""
    files = {name: data for name, data in in_two_parts(PYSTD).items() if name != PART_TWO}
    server.files = server.published = files
    assert f"hf:org/demo lacks {PART_TWO}" in refused(hub, ModelFileError)
    assert not (snapshot(hub) / PART_ONE).exists()


def test_an_interrupted_transfer_goes_on_where_it_stopped(server: FakeHub, hub: Hub) -> None:
    """What arrived of the weights is kept and continued."""
    blobs = hub.cache_dir / "models--org--demo" / "blobs"
    partial = blobs / f"{server.sha256('model.safetensors')}.brim.incomplete"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(PYSTD["model.safetensors"][:100_000])
    spec = resolve("hf:org/demo", hub=hub)
    assert "bytes=100000-" in server.transfers()
    assert Path(spec.paths[0]).read_bytes() == PYSTD["model.safetensors"]


def test_damaged_weights(server: FakeHub, hub: Hub) -> None:
    """Weights with another checksum than the hub's are refused and not kept."""
    data = PYSTD["model.safetensors"]
    server.published = dict(server.files)
    server.files = server.files | {"model.safetensors": data[:-1] + bytes([data[-1] ^ 1])}
    server.answers[f"/cdn/{server.sha256('model.safetensors')}"] = (
        200, {}, server.files["model.safetensors"],
    )  # fmt: skip
    assert "arrived damaged" in refused(hub, ModelFileError)
    assert not (snapshot(hub) / "model.safetensors").exists()


def test_a_full_disk_is_said_before_the_first_byte(
    server: FakeHub, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sum of all parts is compared with the room, not one part after the other."""
    server.files = server.published = in_two_parts(PYSTD)
    parts = sum(len(server.files[part]) for part in (PART_ONE, PART_TWO))
    free = shutil.disk_usage(hub.cache_dir.parent).free
    monkeypatch.setattr(hub_transfer, "KEPT_FREE_BYTES", free - parts * 3 // 4)
    message = refused(hub, DoesNotFit)
    assert "hf:org/demo needs" in message
    assert not (snapshot(hub) / PART_ONE).exists()


def test_a_config_that_is_far_too_large(
    server: FakeHub, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that stands where a small one should is not downloaded."""
    monkeypatch.setattr(hub_choice, "MAX_TEXT_FILE_BYTES", 100)
    assert "more than any model's" in refused(hub, ModelFileError)
    assert server.transfers() == []


def test_a_repository_with_both_forms(server: FakeHub, hub: Hub) -> None:
    """Both are offered; a quant names the GGUF file; neither is fetched before it is chosen."""
    server.files = server.published = {**PYSTD, "Demo-Q8_0.gguf": DEMO}
    forms = forms_of("hf:org/demo", hub=hub)
    assert [form.format for form in forms] == ["gguf", "safetensors"]
    assert [form.describe().num_layers for form in forms] == [6, 2]
    assert not list(hub.cache_dir.glob("**/*.safetensors"))
    assert [form.format for form in forms_of("hf:org/demo:Q8_0", hub=hub)] == ["gguf"]
    assert forms[1].fetch().format == "safetensors"
    assert not list(hub.cache_dir.glob("**/*.gguf"))
    server.requests.clear()
    assert [form.fetch().format for form in forms] == ["gguf", "safetensors"]
    assert "/api/models/org/demo" not in [path for _, path, _ in server.requests]


def test_a_quant_of_a_repository_without_gguf(server: FakeHub, hub: Hub) -> None:
    """It can be planned, and to load it the sentence says what to leave out."""
    for quant, format in (("Q4_K_M", "gguf"), ("MLX 4bit", "safetensors")):
        (form,) = forms_of(f"hf:org/demo:{quant}", hub=hub)
        assert form.format == form.describe().format == format
        assert form.describe().is_estimated
    with pytest.raises(NotFound, match="no GGUF files to choose Q4_K_M from: leave it out"):
        resolve("hf:org/demo:Q4_K_M", hub=hub)


@pytest.mark.parametrize(
    ("format", "repository", "file"),
    [
        ("safetensors", "mlx-community/Qwen3-8B-4bit", "model.safetensors"),
        ("gguf", "bartowski/Qwen_Qwen3-8B-GGUF", "Qwen_Qwen3-8B-Q4_K_M.gguf"),
    ],
)
def test_a_name_of_the_catalogue_is_fetched_in_either_form(
    server: FakeHub, hub: Hub, format: str, repository: str, file: str
) -> None:
    """Both forms are planned without the hub; the one that is taken comes from its repository."""
    server.repository = repository
    server.files = server.published = {**PYSTD, "Qwen_Qwen3-8B-Q4_K_M.gguf": DEMO}
    forms = {form.format: form for form in forms_of("qwen3:8b", hub=hub)}
    assert {form.describe().quant for form in forms.values()} == {"Q4_K_M", "MLX 4bit"}
    assert server.requests == []
    spec = forms[format].fetch()
    assert (spec.name, spec.format, Path(spec.paths[0]).name) == ("qwen3-8b", format, file)
    with pytest.raises(NotFound, match="there is no repository"):
        forms[{"gguf": "safetensors", "safetensors": "gguf"}[format]].fetch()


def test_a_repository_without_models(server: FakeHub, hub: Hub) -> None:
    """A repository of something else says what to look for."""
    server.files = server.published = {"README.md": b"hello", "x.safetensors": b"no model's name"}
    assert "has no .gguf files; look for a repository" in refused(hub, NotFound)


def test_cached_checkpoints_are_listed(server: FakeHub, hub: Hub) -> None:
    """What was downloaded is listed with its form and the reference that resolves to it."""
    spec = resolve("hf:org/demo", hub=hub)
    (listed,) = list_local(hub)[1:]
    assert (listed.reference, listed.spec) == ("hf:org/demo", spec)
    (snapshot(hub) / "model.safetensors").unlink()
    assert len(list_local(hub)) == 1  # a config and a tokenizer alone are no model


class TestOffline:
    def test_a_cached_checkpoint_is_used(self, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without a hub the cached directory is the model, described and resolved."""
        spec = resolve("hf:org/demo", hub=hub)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert resolve("hf:org/demo", hub=hub) == spec
        assert describe("hf:org/demo", hub=hub) == spec

    def test_a_download_that_broke_off(
        self, server: FakeHub, hub: Hub, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Without a hub an incomplete checkpoint names the part that is missing, and the way on."""
        server.files = server.published = in_two_parts(PYSTD)
        resolve("hf:org/demo", hub=hub)
        (snapshot(hub) / PART_TWO).unlink()
        (problem,) = [model.problem for model in list_local(hub)[1:]]
        assert PART_TWO in problem
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        message = refused(hub, NotFound)
        assert f"{PART_TWO} of hf:org/demo is not in the cache" in message
        assert "HF_HUB_OFFLINE" in message
        assert "goes on where it stopped" in message

    def test_weights_whose_blob_is_gone(self, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        """A link of the cache that leads nowhere is named, and not an index that never was."""
        weights = Path(resolve("hf:org/demo", hub=hub).paths[0])
        weights.resolve().unlink()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert "model.safetensors of hf:org/demo is not in the cache" in refused(hub, NotFound)
