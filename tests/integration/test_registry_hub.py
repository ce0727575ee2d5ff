"""Downloads from a hub that runs here: a real HTTP server with real bytes, on 127.0.0.1."""

import os
import pty
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from support.checkpoints import PART_TWO, in_two_parts
from support.hub_server import COMMIT, DEMO, FakeHub, running_hub
from support.models import PYSTD_1M

from brim.bench.standin import clone_blueprint
from brim.bench.standin.source import standin_of
from brim.errors import (
    BrimError,
    DoesNotFit,
    InvalidRequest,
    ModelFileError,
    NotFound,
    Unauthorized,
)
from brim.registry import hub_transfer, remote
from brim.registry.hub import Hub
from brim.registry.sources import DEMO_PATH, describe, list_local, resolve

LIMIT_S = 60.0
"""For a process to begin its transfer, which imports half a second's worth of libraries first."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The running hub."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    with running_hub() as fake:
        yield fake


@pytest.fixture
def hub(server: FakeHub, tmp_path: Path) -> Hub:
    """A client of the running hub with an empty cache."""
    return Hub(endpoint=server.endpoint, cache_dir=tmp_path / "cache")


def error_of(reference: str, hub: Hub, kind: type[BrimError]) -> str:
    """The sentence with which a reference is refused."""
    with pytest.raises(kind) as caught:
        resolve(reference, hub=hub)
    return caught.value.message


class TestDownload:
    def test_bytes_and_place(self, server: FakeHub, hub: Hub) -> None:
        """The file arrives whole, in the cache's own layout, under its own name."""
        spec = resolve("hf:org/demo", hub=hub)
        assert Path(spec.paths[0]).read_bytes() == DEMO
        assert (spec.name, spec.architecture, spec.quant) == ("demo-q8_0", "llama", "Q8_0")
        repository = hub.cache_dir / "models--org--demo"
        assert (repository / "refs" / "main").read_text() == COMMIT
        assert sorted(p.name for p in (repository / "blobs").iterdir()) == [
            server.sha256("Demo-Q8_0.gguf")
        ]
        found = huggingface_hub.try_to_load_from_cache(
            "org/demo", "Demo-Q8_0.gguf", cache_dir=hub.cache_dir
        )
        assert found == spec.paths[0]

    def test_a_second_time_nothing_is_transferred(self, server: FakeHub, hub: Hub) -> None:
        """A cached file is used after one question for what is current."""
        first = resolve("hf:org/demo:q8_0", hub=hub)
        server.requests.clear()
        assert resolve("hf:org/demo:Q8_0", hub=hub) == first
        assert [path for _, path, _ in server.requests] == ["/api/models/org/demo"]

    def test_a_cache_without_links(self, server: FakeHub, hub: Hub) -> None:
        """On a disk that has no links a cached file is known by its place in the snapshot."""
        path = hub.fetch("org/demo")
        path.resolve().rename(path)
        assert not path.is_symlink()
        server.requests.clear()
        assert hub.fetch("org/demo") == path
        assert server.transfers() == []

    def test_split_model(self, server: FakeHub, hub: Hub) -> None:
        """All parts of a split quant are brought, and only those."""
        small = b"GGUF" + bytes(60)
        parts = [f"Q8_0/big-Q8_0-0000{n}-of-00002.gguf" for n in (1, 2)]
        server.files = server.published = {
            parts[0]: small + b"1",
            parts[1]: small + b"2",
            "big-F16.gguf": small,
        }
        path = hub.fetch("org/demo", "q8_0")
        assert path.name == "big-Q8_0-00001-of-00002.gguf"
        assert [p.read_bytes()[-1:] for p in sorted(path.parent.iterdir())] == [b"1", b"2"]
        assert len(server.transfers()) == 2

    def test_list_local_finds_it(self, hub: Hub) -> None:
        """What was downloaded is listed with the reference that resolves to it offline."""
        spec = resolve("hf:org/demo", hub=hub)
        listed = list_local(hub)[1]
        assert listed.spec == spec
        assert resolve(listed.reference, hub=hub) == spec

    def test_no_progress_bar_where_nobody_looks(
        self, hub: Hub, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """Without a terminal nothing is written to stdout or stderr."""
        resolve("hf:org/demo", hub=hub)
        assert capfd.readouterr() == ("", "")

    def test_from_the_environment_with_a_progress_bar(
        self, server: FakeHub, tmp_path: Path
    ) -> None:
        """HF_ENDPOINT and HF_HOME are respected, and a terminal on stderr sees progress."""
        terminal, stderr = pty.openpty()
        termios.tcsetwinsize(stderr, (24, 120))
        code = "from brim.registry.sources import resolve; print(resolve('hf:org/demo').paths[0])"
        home = tmp_path / "home"
        environment = {**os.environ, "HF_ENDPOINT": server.endpoint, "HF_HOME": str(home)}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=stderr,
            text=True, check=True,
        )  # fmt: skip
        os.close(stderr)
        shown = os.read(terminal, 65536).decode()
        os.close(terminal)
        assert Path(done.stdout.strip()).read_bytes() == DEMO
        assert Path(done.stdout.strip()).is_relative_to(home)
        assert "Demo-Q8_0.gguf" in shown
        assert "100%" in shown


class TestResume:
    def test_after_the_process_was_killed(self, server: FakeHub, hub: Hub) -> None:
        """A transfer that was killed half-way goes on from its last byte in another process."""
        # Long enough for more than one of the pieces of 10 MiB in which the library writes.
        whole = DEMO + bytes(30_000_000)
        server.files["Demo-Q8_0.gguf"] = server.published["Demo-Q8_0.gguf"] = whole
        server.hold = threading.Event()
        code = (
            "import sys; from pathlib import Path; from brim.registry.hub import Hub\n"
            "Hub(endpoint=sys.argv[1], cache_dir=Path(sys.argv[2])).fetch('org/demo')"
        )
        command = [sys.executable, "-c", code, server.endpoint, str(hub.cache_dir)]
        blobs = hub.cache_dir / "models--org--demo" / "blobs"
        with subprocess.Popen(command) as process:
            assert server.half_sent.wait(LIMIT_S)
            wait_for_bytes(blobs)
            process.kill()
        (partial,) = blobs.glob("*.incomplete")
        kept = partial.stat().st_size  # it may have been in the middle of a write
        server.hold.set()
        server.hold = None
        assert hub.fetch("org/demo").read_bytes() == whole
        assert server.transfers() == [None, f"bytes={kept}-"]
        assert list(blobs.glob("*.incomplete")) == []

    def test_after_a_dropped_connection(
        self, server: FakeHub, hub: Hub, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A connection that breaks is made again, and the transfer goes on where it stopped."""
        monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _seconds: None)
        whole = DEMO + bytes(30_000_000)
        server.files["Demo-Q8_0.gguf"] = server.published["Demo-Q8_0.gguf"] = whole
        server.cut_after = 25_000_000
        assert hub.fetch("org/demo").read_bytes() == whole
        assert server.transfers() == [None, f"bytes={2 * constants.DOWNLOAD_CHUNK_SIZE}-"]

    def test_a_partial_file_that_is_too_long_is_dropped(self, server: FakeHub, hub: Hub) -> None:
        """More bytes than the file has are no beginning of it."""
        partial = partial_file(server, hub)
        partial.write_bytes(DEMO + b"more")
        assert hub.fetch("org/demo").read_bytes() == DEMO
        assert server.transfers() == [None]

    def test_a_complete_partial_file_is_not_transferred_again(
        self, server: FakeHub, hub: Hub
    ) -> None:
        """A process that died after the last byte leaves nothing to transfer."""
        partial_file(server, hub).write_bytes(DEMO)
        assert hub.fetch("org/demo").read_bytes() == DEMO
        assert server.transfers() == []

    def test_a_connection_that_stays_broken(
        self, server: FakeHub, hub: Hub, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where the bytes cannot be had the sentence says how to go on."""
        monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _seconds: None)
        server.answers["/cdn/"] = (503, {}, b"")
        message = error_of("hf:org/demo", hub, ModelFileError)
        assert "broke off: the hub answers 503" in message
        assert "same command again" in message


def wait_for_bytes(blobs: Path) -> None:
    """Until there is something in the partial file."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        if any(path.stat().st_size for path in blobs.glob("*.incomplete")):
            return
        time.sleep(0.01)
    raise AssertionError(f"nothing was written in {LIMIT_S:g} seconds")


def partial_file(server: FakeHub, hub: Hub) -> Path:
    """Where an interrupted transfer of the demo file is kept."""
    blobs = hub.cache_dir / "models--org--demo" / "blobs"
    blobs.mkdir(parents=True)
    return blobs / f"{server.sha256('Demo-Q8_0.gguf')}.brim.incomplete"


class TestVerification:
    def test_damaged_bytes(self, server: FakeHub, hub: Hub) -> None:
        """One flipped byte is refused by checksum and not kept; then the true file is taken."""
        server.files["Demo-Q8_0.gguf"] = DEMO[:-1] + bytes([DEMO[-1] ^ 1])
        message = error_of("hf:org/demo", hub, ModelFileError)
        assert "arrived damaged" in message
        blobs = hub.cache_dir / "models--org--demo" / "blobs"
        assert list(blobs.iterdir()) == []
        server.files["Demo-Q8_0.gguf"] = DEMO
        assert resolve("hf:org/demo", hub=hub).num_layers == 6

    def test_a_damaged_beginning(self, server: FakeHub, hub: Hub) -> None:
        """A kept part that has rotted is noticed when the rest has arrived."""
        partial_file(server, hub).write_bytes(b"\0" * 1000)
        assert "arrived damaged" in error_of("hf:org/demo", hub, ModelFileError)
        assert hub.fetch("org/demo").read_bytes() == DEMO

    def test_a_checksum_never_becomes_a_path(
        self, server: FakeHub, hub: Hub, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A hub that sends a path for a checksum does not choose where brim writes."""
        monkeypatch.setattr(FakeHub, "sha256", lambda _self, _name: "../../../evil")
        assert "something else" in error_of("hf:org/demo", hub, NotFound)
        assert not list(hub.cache_dir.parent.rglob("evil*"))

    def test_a_full_disk(self, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        """What does not fit on the disk is refused before its first byte."""
        monkeypatch.setattr(hub_transfer, "KEPT_FREE_BYTES", 1 << 60)
        message = error_of("hf:org/demo", hub, DoesNotFit)
        assert "0.0 GB more" in message
        assert "HF_HOME" in message


class TestRefusals:
    def test_no_such_repository(self, hub: Hub) -> None:
        """An unknown repository is NotFound by name."""
        assert "no repository org/none" in error_of("hf:org/none", hub, NotFound)

    def test_an_impossible_repository(self, hub: Hub) -> None:
        """A name that the hub forbids is refused as a name."""
        assert "cannot name a repository" in error_of("hf:org/a--b", hub, InvalidRequest)

    def test_no_such_quant(self, hub: Hub) -> None:
        """An unknown quant lists what there is."""
        message = error_of("hf:org/demo:Q6_K", hub, NotFound)
        assert "has no quant Q6_K; it has Demo-Q8_0.gguf" in message

    def test_gated(self, server: FakeHub, hub: Hub) -> None:
        """A repository with terms says where to accept them and how to log in."""
        server.answers["/org/demo/resolve/"] = (403, {"X-Error-Code": "GatedRepo"}, b"")
        assert "hf auth login" in error_of("hf:org/demo", hub, Unauthorized)

    def test_a_file_that_is_gone(self, server: FakeHub, hub: Hub) -> None:
        """A file that is listed and not there is NotFound."""
        del server.files["Demo-Q8_0.gguf"]
        assert "is gone from the hub" in error_of("hf:org/demo", hub, NotFound)

    def test_too_many_requests(self, server: FakeHub, hub: Hub) -> None:
        """A refusal of another kind is quoted with its status."""
        server.answers["/api/"] = (429, {}, b"")
        assert "status 429" in error_of("hf:org/demo", hub, NotFound)


PYSTD = {path.name: path.read_bytes() for path in PYSTD_1M.iterdir() if path.is_file()}


def large(megabytes: int) -> bytes:
    """The demo model with unused bytes behind its tensors."""
    return DEMO + bytes(megabytes << 20)


class TestDescribe:
    def test_only_headers_are_fetched(self, server: FakeHub, hub: Hub) -> None:
        """A model on the hub is described as its file is, from its first megabyte, and not kept."""
        server.files["Demo-Q8_0.gguf"] = server.published["Demo-Q8_0.gguf"] = large(8)
        spec = describe("hf:org/demo", hub=hub)
        here = describe("demo")
        assert (spec.name, spec.paths) == ("demo-q8_0", ())
        assert (spec.weights_bytes, spec.kv_layers) == (here.weights_bytes, here.kv_layers)
        assert server.num_sent_bytes <= 1 << 20
        assert not list(hub.cache_dir.glob("**/*.gguf"))

    def test_a_header_of_several_requests(
        self, server: FakeHub, hub: Hub, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A header that goes on after the first request is fetched on from there."""
        monkeypatch.setattr(remote, "FIRST_BYTES", 4096)
        assert describe("hf:org/demo", hub=hub).num_layers == 6
        assert [span for span in server.transfers() if span][:2] == [
            "bytes=0-4095", "bytes=4096-8191",
        ]  # fmt: skip

    def test_a_cached_file_is_not_asked_for(self, server: FakeHub, hub: Hub) -> None:
        """What is in the cache is described from there."""
        fetched = resolve("hf:org/demo", hub=hub)
        server.requests.clear()
        assert describe("hf:org/demo:Q8_0", hub=hub) == fetched
        assert server.transfers() == []

    def test_a_server_without_ranges(self, server: FakeHub, hub: Hub) -> None:
        """A server that sends everything is left after what was wanted."""
        server.ignores_ranges = True
        assert describe("hf:org/demo", hub=hub).num_layers == 6

    def test_safetensors(self, server: FakeHub, hub: Hub) -> None:
        """A repository with a checkpoint is described from its config and its parts' headers."""
        server.files = server.published = dict(PYSTD)
        spec = describe("hf:org/demo", hub=hub)
        here = describe(str(PYSTD_1M))
        assert (spec.name, spec.format) == ("demo", "safetensors")
        assert (spec.weights_bytes, spec.fingerprint) == (here.weights_bytes, here.fingerprint)

    def test_safetensors_in_parts(self, server: FakeHub, hub: Hub) -> None:
        """Parts are found by their index, and one that is gone is named."""
        server.files = server.published = in_two_parts(PYSTD)
        spec = describe("hf:org/demo", hub=hub)
        assert spec.weights_bytes == describe(str(PYSTD_1M)).weights_bytes
        assert server.num_sent_bytes < spec.weights_bytes / 4
        server.files = {name: data for name, data in server.files.items() if name != PART_TWO}
        with pytest.raises(NotFound, match=f"{PART_TWO} of hf:org/demo cannot be read"):
            describe("hf:org/demo", hub=hub)

    def test_a_file_that_is_cut_short(self, server: FakeHub, hub: Hub) -> None:
        """A GGUF file that ends before its tensors do is refused from its header."""
        server.files = server.published = {"Demo-Q8_0.gguf": DEMO[:-1000]}
        with pytest.raises(ModelFileError, match="is cut short: its tensors end at byte"):
            describe("hf:org/demo", hub=hub)

    def test_a_quant_for_a_checkpoint(self, server: FakeHub, hub: Hub) -> None:
        """With a quant the config alone is fetched."""
        server.files = server.published = dict(PYSTD)
        with pytest.raises(InvalidRequest, match="names a quant already"):
            describe("hf:org/demo:Q8_0", quant="Q4_K_M", hub=hub)
        spec = describe("hf:org/demo:q4_k_m", quant="Q4_K_M", hub=hub)
        assert (spec.quant, spec.is_estimated) == ("Q4_K_M", True)
        assert server.num_sent_bytes == len(PYSTD["config.json"])

    def test_an_address(self, server: FakeHub) -> None:
        """A GGUF file at an address is described by ranges too."""
        spec = describe(f"{server.endpoint}/org/demo/resolve/main/Demo-Q8_0.gguf")
        assert (spec.name, spec.num_layers) == ("demo-q8_0", 6)

    def test_an_address_with_a_query(self, server: FakeHub) -> None:
        """What follows a file's name, as in the hub's own links, is sent for every part."""
        server.answers["/x-0000"] = (200, {}, DEMO)
        query = "download=true&from=a/b"
        with pytest.raises(ModelFileError, match="says that it is part 0"):
            describe(f"{server.endpoint}/x-00002-of-00002.gguf?{query}")
        assert [path for _, path, _ in server.requests] == [
            "/x-00001-of-00002.gguf", "/x-00002-of-00002.gguf",
        ]  # fmt: skip
        assert server.queries == [query, query]

    def test_a_query_is_no_part_of_the_name(self, server: FakeHub) -> None:
        """The model is called by its file, whatever its link ends in."""
        address = f"{server.endpoint}/org/demo/resolve/main/Demo-Q8_0.gguf?v=1.5/2"
        assert describe(address).name == "demo-q8_0"

    def test_a_password_is_not_shown(self, server: FakeHub) -> None:
        """A message names the server without the user's secret before it."""
        address = server.endpoint.replace("//", "//me:secret@") + "/No.gguf"
        with pytest.raises(NotFound) as caught:
            describe(address)
        assert "answers 404" in caught.value.message
        assert "secret" not in caught.value.message

    def test_a_closed_address(self, server: FakeHub) -> None:
        """Another server than the hub is not logged into with the hub's command."""
        server.answers["/closed"] = (403, {}, b"")
        with pytest.raises(Unauthorized, match=r"refuses x\.gguf of .*; download it"):
            describe(f"{server.endpoint}/closed/x.gguf")

    def test_a_checkpoint_beside_a_projector(self, server: FakeHub, hub: Hub) -> None:
        """A repository whose only GGUF file is a projector is described as its checkpoint."""
        server.files = server.published = {**PYSTD, "mmproj-F16.gguf": DEMO}
        assert describe("hf:org/demo", hub=hub).format == "safetensors"

    @pytest.mark.parametrize(
        ("reference", "kind", "says"),
        [
            ("{endpoint}/org/demo/resolve/main/No.gguf", NotFound, "answers 404"),
            ("{endpoint}/page.html", NotFound, "no address of a .gguf file"),
            ("http://127.0.0.1:9/x.gguf", NotFound, "check the connection"),
            ("hf:org", NotFound, "not of the form"),
            ("hf:org/demo:Q2_K", NotFound, "has no quant Q2_K"),
        ],
    )
    def test_refusals(
        self, server: FakeHub, hub: Hub, reference: str, kind: type[BrimError], says: str
    ) -> None:
        """What is not there gives one sentence."""
        with pytest.raises(kind) as caught:
            describe(reference.format(endpoint=server.endpoint), hub=hub)
        assert says in caught.value.message

    def test_a_gated_repository(self, server: FakeHub, hub: Hub) -> None:
        """A file that wants a login says how to log in."""
        server.answers["/org/demo/resolve"] = (403, {}, b"")
        with pytest.raises(Unauthorized, match="hf auth login"):
            describe("hf:org/demo", hub=hub)

    def test_damage(self, server: FakeHub, hub: Hub) -> None:
        """A remote header that is none is refused with the file's name."""
        server.files["Demo-Q8_0.gguf"] = b"<html>" + bytes(1000)
        server.published = server.files
        with pytest.raises(ModelFileError, match=r"Demo-Q8_0\.gguf of hf:org/demo is not a GGUF"):
            describe("hf:org/demo", hub=hub)


class TestStandin:
    def test_a_header_is_enough(self, server: FakeHub, hub: Hub) -> None:
        """A stand-in's shape comes from the hub without a weight, and is the file's own."""
        server.files["Demo-Q8_0.gguf"] = server.published["Demo-Q8_0.gguf"] = large(8)
        assert standin_of("hf:org/demo:Q8_0", hub=hub) == ("demo", clone_blueprint(DEMO_PATH))
        assert server.num_sent_bytes <= 1 << 20

    def test_a_cached_file(self, server: FakeHub, hub: Hub) -> None:
        """What is in the cache is read from there."""
        resolve("hf:org/demo", hub=hub)
        server.requests.clear()
        assert standin_of("hf:org/demo", hub=hub)[1] == clone_blueprint(DEMO_PATH)
        assert server.transfers() == []

    def test_a_checkpoint(self, server: FakeHub, hub: Hub) -> None:
        """Of a repository without GGUF files the config is laid out, in the quant asked for."""
        server.files = server.published = dict(PYSTD)
        assert standin_of("hf:org/demo", "Q8_0", hub=hub)[1] == standin_of(str(PYSTD_1M), "Q8_0")[1]


def make_unreachable(server: FakeHub, monkeypatch: pytest.MonkeyPatch, how: str) -> str:
    """Cuts the hub off in one of several ways; gives what the message must say."""
    if how == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        return "HF_HUB_OFFLINE"
    if how == "no network":
        # The discard port, where nothing listens.
        monkeypatch.setattr(server, "endpoint", "http://127.0.0.1:9")
        return "cannot be reached"
    if how == "server error":
        server.answers["/"] = (500, {}, b"")
        return "answers 500"
    server.answers["/"] = (200, {"Content-Type": "text/html"}, b"<html>log in first</html>")
    return "something else"


@pytest.mark.parametrize("how", ["offline", "no network", "server error", "login page"])
class TestUnreachable:
    def test_cached(
        self, server: FakeHub, hub: Hub, monkeypatch: pytest.MonkeyPatch, how: str
    ) -> None:
        """Without a hub, what is cached is used, with and without a quant."""
        spec = resolve("hf:org/demo", hub=hub)
        make_unreachable(server, monkeypatch, how)
        cut_off = Hub(endpoint=server.endpoint, cache_dir=hub.cache_dir)
        assert resolve("hf:org/demo", hub=cut_off) == spec
        assert resolve("hf:org/demo:Q8_0", hub=cut_off) == spec

    def test_not_cached(
        self, server: FakeHub, hub: Hub, monkeypatch: pytest.MonkeyPatch, how: str
    ) -> None:
        """Without a hub, what is not cached gives a sentence with the reason."""
        reason = make_unreachable(server, monkeypatch, how)
        cut_off = Hub(endpoint=server.endpoint, cache_dir=hub.cache_dir)
        message = error_of("hf:org/demo", cut_off, NotFound)
        assert "is not in the cache" in message
        assert reason in message

    def test_another_quant(
        self, server: FakeHub, hub: Hub, monkeypatch: pytest.MonkeyPatch, how: str
    ) -> None:
        """A quant that is not cached lists what is, and says that only the cache was looked at."""
        resolve("hf:org/demo", hub=hub)
        reason = make_unreachable(server, monkeypatch, how)
        cut_off = Hub(endpoint=server.endpoint, cache_dir=hub.cache_dir)
        message = error_of("hf:org/demo:F16", cut_off, NotFound)
        assert "it has Demo-Q8_0.gguf" in message
        assert reason in message
