"""Segments in memory: what is taken in, and what is not."""

from typing import Any

import msgspec
import pytest
from support.prefixes import ids

from brim.core.cache import MissReason
from brim.prefix_cache import index as index_module
from brim.prefix_cache.format import Header, prefix_hash
from brim.prefix_cache.index import Index

TOKENS = [*range(100, 160)]


def header(tokens: list[int], start: int = 0, parent: str = "", **changes: Any) -> Header:
    whole = Header(
        identity="x", model_hash=b"m" * 32, namespace="", model_name="m", model_paths=(),
        model_bytes=1, start=start, tokens=ids(tokens[start:]),
        start_hash=prefix_hash(ids(tokens[:start])), end_hash=prefix_hash(ids(tokens)),
        parent=parent, block_bytes=1000, block_head=b"h" * 64,
    )  # fmt: skip
    return msgspec.structs.replace(whole, **changes)


@pytest.fixture
def index() -> Index:
    """Holds one entry of the first 40 tokens."""
    index = Index(can_cut=True)
    assert index.add(header(TOKENS[:40]), "/base")
    return index


BASE = header(TOKENS[:40]).key


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"parent": "0" * 32}, id="no such parent"),
        pytest.param({"namespace": "other"}, id="a parent of another namespace"),
        pytest.param({"start_hash": b"x" * 32}, id="other tokens before it"),
        pytest.param({"end_hash": b"x" * 32}, id="other tokens up to its end"),
    ],
)
def test_what_does_not_continue_its_parent_is_refused(
    index: Index, changes: dict[str, Any]
) -> None:
    """A header that fits no chain changes nothing."""
    sound = header(TOKENS, 40, BASE)
    assert not index.add(msgspec.structs.replace(sound, **changes), "/x")
    assert index.find("", ids(TOKENS), 0).num_tokens == 40
    assert index.num_entries == 1


@pytest.mark.parametrize("start", [41, 60])
def test_a_gap_behind_the_parent_is_refused(index: Index, start: int) -> None:
    """A segment begins at its parent's end at the latest."""
    tokens = [*TOKENS, *range(20)]
    assert not index.add(header(tokens, start, BASE), "/x")
    assert index.add(header(tokens, 40, BASE), "/x")


def test_a_parent_that_begins_with_it_is_refused(index: Index) -> None:
    """Chains go back to 0 and never round in circles."""
    middle = header(TOKENS[:50], 40, BASE)
    assert index.add(middle, "/middle")
    assert not index.add(header(TOKENS, 40, middle.key), "/x")


def test_an_entry_that_comes_twice_is_one(index: Index) -> None:
    """What is on its way and is found on the disk has arrived; what is there stays."""
    more = header(TOKENS, 40, BASE)
    assert index.add(more, "/more", is_pending=True)
    assert index.keys() == {BASE}
    assert index.is_pending(more.key)
    assert index.find("", ids(TOKENS), 0).num_tokens == 40
    assert index.add(more, "/more")
    assert index.add(more, "/more")
    assert index.keys() == {BASE, more.key}
    assert index.num_entries == 2
    assert index.num_bytes == more.num_bytes + header(TOKENS[:40]).num_bytes
    assert index.find("", ids(TOKENS), 0).num_tokens == 60


def test_an_arrival_nobody_knows_is_told(index: Index) -> None:
    """An entry that was removed meanwhile is not brought back by its arrival."""
    assert index.set_on_disk(BASE)
    assert not index.set_on_disk("0" * 32)
    assert index.remove("0" * 32) == []


def test_the_chain_with_the_fewest_bytes_is_taken(index: Index) -> None:
    """Of two chains that restore the same, the one that reads less."""
    index.add(header(TOKENS, block_bytes=10**9), "/whole")
    index.add(header(TOKENS, 40, BASE), "/rest")
    found = index.find("", ids(TOKENS), 0)
    assert [segment.path for segment in found.segments] == ["/base", "/rest"]


def test_as_many_damaged_prefixes_are_remembered_as_fit(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the bound the memory begins anew, with the newest."""
    monkeypatch.setattr(index_module, "MAX_DAMAGED", 1)
    other = [*range(50)]
    index.add(header(other), "/other")
    for tokens in (TOKENS[:40], other):
        index.remove(header(tokens).key, is_damaged=True)
    assert index.find("", ids(TOKENS), 0).miss is MissReason.NO_ENTRY
    assert index.find("", ids(other), 0).miss is MissReason.DAMAGED


def test_other_forms_explain_by_their_first_segments(index: Index) -> None:
    """Of the same model in another form only what begins a prompt is noted."""
    prompt = [*range(7, 60)]
    index.add_other(header(prompt[:30]))
    index.add_other(header(prompt, 30, "0" * 32))
    assert index.find("", ids(prompt), 0).miss is MissReason.MODEL_CHANGED
    assert index.find("b", ids(prompt), 0).miss is MissReason.NO_ENTRY
