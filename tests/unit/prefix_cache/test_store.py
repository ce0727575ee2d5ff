"""What the scheduler gets from the store: restored prefixes, reasons for misses, and counts."""

import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from support.prefixes import TOY_MODEL, Filler, ids

from brim.core.cache import MissReason
from brim.errors import Busy, EngineError
from brim.prefix_cache import files
from brim.prefix_cache import format as form
from brim.prefix_cache.store import Allocate, Model, PrefixCache
from brim.prefix_cache.writer import Writer

OpenStore = Callable[..., PrefixCache]

SYSTEM = [*range(100, 140)]
FIRST = [*SYSTEM, *range(40)]
SECOND = [*SYSTEM, *range(200, 230)]


def files_of(directory: Path) -> list[Path]:
    return sorted(directory.glob("*/*.kv"))


def test_an_empty_store_finds_nothing(cache: PrefixCache) -> None:
    """A directory that was not there is made, and every prompt is a miss without an entry."""
    found = cache.find("", ids(FIRST))
    assert (found.segments, found.num_tokens, found.miss) == ((), 0, MissReason.NO_ENTRY)
    assert cache.stored("", ids(FIRST)) == 0


def test_what_was_written_is_restored(cache: PrefixCache, toy: Filler) -> None:
    """A kept prompt is found whole, and continues as if it had been read anew."""
    assert toy.keep(cache, FIRST)
    cache.flush()
    assert cache.find("", ids(FIRST)).miss is None
    assert toy.assert_restores(cache, FIRST) == len(FIRST)
    stats = cache.stats()
    assert (stats.num_entries, stats.num_written, stats.num_read) == (1, 1, 1)
    assert stats.entry_bytes == stats.written_bytes == stats.read_bytes > 0
    assert stats.written_bytes_today == stats.written_bytes
    assert stats.inflight_bytes == 0


def test_a_segment_counts_as_stored_while_it_is_written(cache: PrefixCache, toy: Filler) -> None:
    """What is on its way is not written twice, is in flight, and is not restored yet."""
    toy.keep(cache, FIRST)
    assert cache.stored("", ids(FIRST)) == len(FIRST)
    cache.flush()
    assert cache.find("", ids(FIRST)).num_tokens == len(FIRST)


def test_entries_survive_the_process(open_cache: OpenStore, toy: Filler) -> None:
    """Another store on the same directory finds what the first one wrote."""
    first = open_cache()
    toy.keep(first, SYSTEM)
    toy.keep(first, FIRST)
    first.close()
    second = open_cache()
    assert second.stats().num_entries == 2
    assert toy.assert_restores(second, FIRST) == len(FIRST)


def test_a_shared_prefix_is_on_the_disk_once(
    cache: PrefixCache, toy: Filler, directory: Path
) -> None:
    """A prompt that branches off in the middle of an entry adds its own tokens and no others."""
    toy.keep(cache, FIRST)
    toy.keep(cache, SECOND)
    cache.flush()
    for prompt in (FIRST, SECOND, SYSTEM):
        assert toy.assert_restores(cache, prompt) == len(prompt)
    (base, branch) = cache.find("", ids(SECOND)).segments
    assert (base.start, base.end) == (0, len(FIRST))
    assert (branch.start, branch.end) == (len(SYSTEM), len(SECOND))
    assert branch.parent == base.key
    assert len(files_of(directory)) == 2


def test_branches_of_branches_know_their_parents(cache: PrefixCache, toy: Filler) -> None:
    """A third prompt that leaves the second one early continues the second, not the first."""
    third = [*SECOND[:-10], *range(300 - 60, 250)]
    for prompt in (FIRST, SECOND, third):
        toy.keep(cache, prompt)
    cache.flush()
    assert [s.start for s in cache.find("", ids(third)).segments] == [0, 40, 60]
    for prompt in (third, SECOND, FIRST):
        assert toy.assert_restores(cache, prompt) == len(prompt)


def test_what_memory_holds_is_not_restored(cache: PrefixCache, toy: Filler) -> None:
    """Segments that end within the held tokens are left out; one that begins there is not."""
    toy.keep(cache, SYSTEM)
    toy.keep(cache, FIRST)
    cache.flush()
    held = cache.find("", ids(FIRST), num_held=50)
    assert [(segment.start, segment.end) for segment in held.segments] == [(40, 80)]
    assert held.num_tokens == len(FIRST)
    all_held = cache.find("", ids(FIRST), num_held=len(FIRST))
    assert (all_held.segments, all_held.num_tokens, all_held.miss) == ((), len(FIRST), None)


def test_little_is_not_worth_a_file(open_cache: OpenStore, toy: Filler) -> None:
    """A file is not read for fewer tokens than a tile of rows, unless that is all that lacks."""
    cache = open_cache(min_tokens=64)
    toy.keep(cache, FIRST)
    cache.flush()
    assert cache.find("", ids([*FIRST[:15], *SECOND[:60]])).segments == ()
    assert cache.find("", ids([*FIRST[:16], *SECOND[:60]])).num_tokens == 16
    assert cache.find("", ids(FIRST), num_held=len(FIRST) - 3).num_tokens == len(FIRST)


class TestMisses:
    """Every miss has its reason."""

    def test_diverges(self, cache: PrefixCache, toy: Filler) -> None:
        """Where another entry goes on differently, the first differing token is named."""
        toy.keep(cache, FIRST)
        cache.flush()
        found = cache.find("", ids([*FIRST[:50], 5, 6, 7]))
        assert (found.miss, found.diverges_at) == (MissReason.DIVERGES, 50)
        assert found.num_tokens == 50

    def test_the_rest_is_new(self, cache: PrefixCache, toy: Filler) -> None:
        """Where the entries end and the prompt goes on, there is no entry for the rest."""
        toy.keep(cache, FIRST)
        cache.flush()
        found = cache.find("", ids([*FIRST, 1, 2]))
        assert (found.num_tokens, found.miss) == (len(FIRST), MissReason.NO_ENTRY)

    def test_a_shared_begin_is_no_divergence(self, cache: PrefixCache, toy: Filler) -> None:
        """Prompts that share a begin token and a role have nothing to do with each other."""
        toy.keep(cache, FIRST)
        cache.flush()
        assert cache.find("", ids([*FIRST[:7], 1, 2])).miss is MissReason.NO_ENTRY

    def test_not_shareable(self, cache: PrefixCache, toy: Filler) -> None:
        """An entry of the owner's other namespace is none, and the reason is all that is said."""
        toy.keep(cache, FIRST, namespace="a/mail")
        cache.flush()
        for namespace in ("a", "a/chat"):
            found = cache.find(namespace, ids(FIRST))
            assert (found.segments, found.num_tokens) == ((), 0)
            assert (found.miss, found.diverges_at) == (MissReason.NOT_SHAREABLE, 0)
            assert cache.stored(namespace, ids(FIRST)) == 0

    def test_nothing_is_said_of_other_owners(self, cache: PrefixCache, toy: Filler) -> None:
        """No reason changes with what another owner keeps, or guesses could be tried by it."""
        prompt = ids(FIRST)
        before = cache.find("a/mail", prompt)
        for namespace in ("b", "b/mail", "", "/mail", "shared"):
            toy.keep(cache, FIRST, namespace=namespace)
        cache.flush()
        assert cache.find("a/mail", prompt) == before
        assert before.miss is MissReason.NO_ENTRY

    @pytest.mark.parametrize(
        "other",
        [
            Model(name="toy", paths=(), identity="toy, newer"),
            Model(name="other", paths=("/m",), identity="toy, newer"),
        ],
    )
    def test_model_changed(self, open_cache: OpenStore, toy: Filler, other: Model) -> None:
        """The same prompt of the same model in another form says that the model changed."""
        first = open_cache(model=Model(name="toy", paths=("/m",), identity="toy"))
        toy.keep(first, FIRST)
        first.close()
        second = open_cache(model=other)
        found = second.find("", ids(FIRST))
        assert (found.segments, found.miss) == ((), MissReason.MODEL_CHANGED)
        assert second.find("", ids(range(50))).miss is MissReason.NO_ENTRY

    def test_another_model_is_no_entry(self, open_cache: OpenStore, toy: Filler) -> None:
        """Entries of a model with another name and other files are nobody's business."""
        first = open_cache()
        toy.keep(first, FIRST)
        first.close()
        other = open_cache(model=Model(name="x", paths=("/x",), identity="x"))
        assert other.find("", ids(FIRST)).miss is MissReason.NO_ENTRY

    def test_damaged(self, cache: PrefixCache, toy: Filler, directory: Path) -> None:
        """A damaged entry is counted, removed and named as the reason, until it is replaced."""
        toy.keep(cache, FIRST)
        cache.flush()
        (path,) = files_of(directory)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        toy.restore(cache, FIRST)
        assert cache.find("", ids(FIRST)).miss is MissReason.DAMAGED
        cache.flush()
        assert (cache.stats().num_damaged, files_of(directory)) == (1, [])
        toy.keep(cache, FIRST)
        cache.flush()
        assert cache.find("", ids(FIRST)).miss is None


def test_a_model_file_that_was_replaced_shares_nothing(
    open_cache: OpenStore, toy: Filler, tmp_path: Path
) -> None:
    """Two files with one identity, as of two fine-tunes, have entries of their own."""
    file = tmp_path / "model.gguf"
    model = Model(name="m", paths=(str(file),), identity="toy")
    file.write_bytes(b"a" * 10_000)
    first = open_cache(model=model)
    toy.keep(first, FIRST)
    first.close()
    file.write_bytes(b"b" * 10_000)
    assert open_cache(model=model).find("", ids(FIRST)).miss is MissReason.MODEL_CHANGED


def test_a_damaged_parent_takes_its_children_along(
    cache: PrefixCache, toy: Filler, directory: Path
) -> None:
    """What continues a damaged segment is found no more, and leaves no file behind."""
    toy.keep(cache, SYSTEM)
    toy.keep(cache, FIRST)
    cache.flush()
    base = cache.find("", ids(FIRST)).segments[0]
    path = Path(base.path)
    path.write_bytes(path.read_bytes()[:-1])
    assert cache.read(base) is None
    assert cache.find("", ids(FIRST)).segments == ()
    cache.flush()
    assert files_of(directory) == []
    assert cache.read(base) is None
    assert cache.stats().num_damaged == 1


def test_an_entry_that_vanished_is_a_miss(cache: PrefixCache, toy: Filler, directory: Path) -> None:
    """A file that another process removed is no damage, and is not found again."""
    toy.keep(cache, FIRST)
    cache.flush()
    segment = cache.find("", ids(FIRST)).segments[0]
    Path(segment.path).unlink()
    assert cache.read(segment) is None
    assert cache.find("", ids(FIRST)).miss is MissReason.NO_ENTRY
    assert cache.stats().num_damaged == 0
    assert cache.stats().num_entries == 0


def test_an_entry_in_the_place_of_another_is_refused(
    cache: PrefixCache, toy: Filler, directory: Path
) -> None:
    """A sound file under another's name is a miss: its tokens are not those of the prompt."""
    toy.keep(cache, FIRST)
    toy.keep(cache, SECOND, start=0)
    cache.flush()
    first, second = (cache.find("", ids(each)).segments[-1] for each in (FIRST, SECOND))
    Path(first.path).write_bytes(Path(second.path).read_bytes())
    assert cache.read(first) is None
    assert cache.stats().num_damaged == 1


def test_another_apps_entry_in_the_place_of_ones_own_is_refused(
    cache: PrefixCache, toy: Filler
) -> None:
    """Not even the same tokens are taken from a file of another namespace."""
    for namespace in ("a", "b"):
        toy.keep(cache, FIRST, namespace=namespace)
    cache.flush()
    left, right = (cache.find(namespace, ids(FIRST)).segments[0] for namespace in ("a", "b"))
    Path(left.path).write_bytes(Path(right.path).read_bytes())
    assert cache.read(left) is None
    assert cache.read(right) is not None


def test_a_block_in_the_place_of_another_is_refused(
    cache: PrefixCache, toy: Filler, directory: Path
) -> None:
    """A header before another entry's block, both of them whole, is a miss."""
    toy.keep(cache, FIRST)
    toy.keep(cache, [*reversed(FIRST)])
    cache.flush()
    left, right = (
        Path(cache.find("", ids(each)).segments[0].path) for each in (FIRST, FIRST[::-1])
    )
    page = 16 * 1024
    right.write_bytes(right.read_bytes()[:page] + left.read_bytes()[page:])
    assert cache.read(cache.find("", ids(FIRST[::-1])).segments[0]) is None
    assert cache.read(cache.find("", ids(FIRST)).segments[0]) is not None


def test_a_forged_header_is_refused(
    cache: PrefixCache, toy: Filler, open_cache: OpenStore, directory: Path
) -> None:
    """Other tokens under the hashes of these are noticed, by a running store and a new one."""
    toy.keep(cache, FIRST)
    cache.flush()
    (segment,) = cache.find("", ids(FIRST)).segments
    path = Path(segment.path)
    header, block = files.map_entry(path, None)
    forged = msgspec.structs.replace(header, tokens=header.tokens[::-1])
    path.write_bytes(form.encode(forged) + block)
    assert cache.read(segment) is None
    assert cache.stats().num_damaged == 1
    path.write_bytes(form.encode(forged) + block)
    assert open_cache().find("", ids(FIRST[::-1])).segments == ()


def test_a_copy_under_another_name_is_removed(
    cache: PrefixCache, toy: Filler, open_cache: OpenStore, directory: Path
) -> None:
    """A name that does not follow from the header is damage when a store is opened."""
    toy.keep(cache, FIRST)
    cache.flush()
    (path,) = files_of(directory)
    copy = path.with_name("0" * 32 + ".kv")
    copy.write_bytes(path.read_bytes())
    copy.chmod(0o600)
    assert open_cache().stats().num_damaged == 1
    assert files_of(directory) == [path]


def test_a_child_that_arrives_after_its_parent_went_goes_too(
    cache: PrefixCache, toy: Filler, directory: Path
) -> None:
    """A parent that is found damaged while its child is written leaves neither behind."""
    toy.keep(cache, SYSTEM)
    cache.flush()
    (base,) = cache.find("", ids(SYSTEM)).segments
    with files.locked(directory):
        assert toy.keep(cache, FIRST)
        cache.discard(base)
    for _ in range(2):
        cache.flush()
    assert files_of(directory) == []
    assert cache.find("", ids(FIRST)).miss is MissReason.DAMAGED
    assert (cache.stats().num_entries, cache.stats().inflight_bytes) == (0, 0)


def test_a_defect_on_the_other_thread_does_not_end_it(
    cache: PrefixCache,
    toy: Filler,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A job that fails is said, and later entries are still written."""

    def fail(writer: Writer, paths: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(Writer, "read_ahead", fail)
    toy.keep(cache, SYSTEM)
    cache.flush()
    cache.find("", ids(SYSTEM))
    toy.keep(cache, FIRST)
    cache.flush()
    assert "prefix_cache_job_failed" in capsys.readouterr().err
    assert toy.assert_restores(cache, FIRST) == len(FIRST)
    cache.flush()


def test_a_mapping_asks_ahead_where_a_file_cannot(
    cache: PrefixCache, toy: Filler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without posix_fadvise, as on macOS, entries are restored all the same."""
    monkeypatch.setattr(files, "CAN_READ_AHEAD", False)
    toy.keep(cache, FIRST)
    cache.flush()
    assert toy.assert_restores(cache, FIRST) == len(FIRST)


class TestWholeEntries:
    """Engines that cannot cut, or cannot export parts."""

    def test_only_whole_prefixes_help_where_nothing_can_be_cut(
        self, open_cache: OpenStore, toy: Filler
    ) -> None:
        """A snapshot restores prompts that begin with all of it; the longest such is taken."""
        cache = open_cache(can_cut=False)
        for prompt in (SYSTEM, FIRST):
            assert cache.stored("", ids(prompt)) == 0
            assert toy.keep(cache, prompt)
        cache.flush()
        assert toy.assert_restores(cache, [*FIRST, 1, 2]) == len(FIRST)
        assert toy.assert_restores(cache, FIRST) == len(FIRST)
        assert toy.assert_restores(cache, FIRST[:-1]) == len(SYSTEM)
        short = cache.find("", ids(SYSTEM[:-1]))
        assert (short.segments, short.miss) == ((), MissReason.NO_ENTRY)
        parted = cache.find("", ids([*FIRST[:60], 3]))
        assert (parted.num_tokens, parted.miss, parted.diverges_at) == (
            len(SYSTEM), MissReason.DIVERGES, 60,
        )  # fmt: skip

    def test_a_longer_entry_replaces_shorter_ones_that_it_can_be_cut_to(
        self, open_cache: OpenStore, toy: Filler, directory: Path
    ) -> None:
        """Where parts cannot be exported but states be cut, a growing prompt keeps one file."""
        cache = open_cache(can_export_range=False)
        for prompt in (SYSTEM, FIRST, [*FIRST, *range(20)]):
            assert toy.keep(cache, prompt)
            cache.flush()
        assert len(files_of(directory)) == cache.stats().num_entries == 1
        assert toy.assert_restores(cache, FIRST[:50]) == 50
        assert not toy.keep(cache, SYSTEM)
        assert cache.stats().skipped == {"already stored": 1}

    def test_parts_are_not_taken(self, open_cache: OpenStore, toy: Filler) -> None:
        """A part from elsewhere than 0 is skipped where entries are whole."""
        cache = open_cache(can_cut=False)
        toy.keep(cache, SYSTEM)
        assert not toy.keep(cache, FIRST, start=len(SYSTEM))
        assert cache.stats().skipped == {"no parent": 1}


class TestExports:
    """What an engine may do while it exports."""

    @pytest.mark.parametrize(
        ("error", "reason"),
        [
            (Busy("no sequence is free"), "engine busy"),
            (EngineError("the backend failed"), "export failed"),
        ],
    )
    def test_errors_are_counted_and_leave_nothing(
        self, cache: PrefixCache, directory: Path, error: Exception, reason: str
    ) -> None:
        """An export that fails half-way is skipped, and its file is gone."""

        def export(allocate: Allocate) -> None:
            allocate(1000)[:10] = b"0123456789"
            raise error

        assert not cache.write("", ids(FIRST), 0, export)
        assert cache.stats().skipped == {reason: 1}
        assert cache.stats().inflight_bytes == 0
        assert list((directory / "tmp").iterdir()) == []
        assert cache.stored("", ids(FIRST)) == 0

    def test_an_export_may_be_tried_twice(
        self, cache: PrefixCache, toy: Filler, directory: Path
    ) -> None:
        """Room that is asked for again is new room, and the first file is gone."""
        seq_id = toy.read(FIRST)

        def export(allocate: Allocate) -> None:
            allocate(123)
            toy.engine.export_kv(seq_id, allocate=allocate)

        assert cache.write("", ids(FIRST), 0, export)
        cache.flush()
        assert toy.assert_restores(cache, FIRST) == len(FIRST)
        assert list((directory / "tmp").iterdir()) == []

    def test_an_export_of_nothing_is_skipped(self, cache: PrefixCache) -> None:
        """An engine that asks for no room has exported nothing."""
        assert not cache.write("", ids(FIRST), 0, lambda allocate: None)
        assert cache.stats().skipped == {"export failed": 1}


def test_a_closed_store_takes_nothing(cache: PrefixCache, toy: Filler) -> None:
    """After the end writes are skipped; closing twice is no error."""
    cache.close()
    cache.close()
    assert not toy.keep(cache, FIRST)
    assert cache.stats().skipped == {"closed": 1}


def test_names_tell_nothing(cache: PrefixCache, toy: Filler, directory: Path) -> None:
    """No file or directory is named after a namespace, a model or a path, and all are private."""
    toy.keep(cache, FIRST, namespace="secret-app")
    cache.flush()
    names = " ".join(str(path.relative_to(directory)) for path in directory.rglob("*"))
    assert not any(word in names for word in ("secret", "app", TOY_MODEL.name))
    for path in [directory, *directory.rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


def test_writes_are_counted_for_each_owner(cache: PrefixCache, toy: Filler) -> None:
    """An owner's namespaces count together, and only what reached the disk."""
    for namespace in ("app:mail", "app:mail/drafts", "app:code", ""):
        toy.keep(cache, FIRST, namespace=namespace)
    toy.keep(cache, FIRST, namespace="app:mail")
    cache.flush()
    stats = cache.stats()
    assert stats.num_written == 4
    one = stats.written_bytes / 4
    by_owner = stats.written_by_owner
    assert by_owner.keys() == {"app:mail", "app:code", ""}
    assert sum(by_owner.values()) == stats.written_bytes
    assert by_owner["app:mail"] == pytest.approx(2 * one, rel=0.2)


def test_a_flush_may_have_an_end(cache: PrefixCache, toy: Filler) -> None:
    """A disk that hangs holds nobody up for longer."""
    is_let_go = threading.Event()

    def hang() -> None:
        is_let_go.wait(60.0)

    cache._writer.put(hang)
    toy.keep(cache, FIRST)
    cache.flush(0.01)
    assert cache.stats().num_written == 0
    is_let_go.set()
    cache.flush()
    assert cache.stats().num_written == 1
