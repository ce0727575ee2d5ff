"""Every byte of an entry, changed in turn: always a miss, never an answer."""

import os
from pathlib import Path

import pytest
from support.driver import GREEDY
from support.prefixes import Filler, ids, open_store

from brim.core.cache import MissReason
from brim.errors import StoreError
from brim.prefix_cache import files

PROMPT = [*range(40, 90)]


@pytest.fixture
def entry(tmp_path: Path) -> Path:
    """The file of one entry of 50 tokens."""
    cache = open_store(tmp_path / "c")
    Filler().keep(cache, PROMPT)
    cache.close()
    (path,) = (tmp_path / "c").glob("*/*.kv")
    return path


def test_no_byte_of_an_entry_can_change_unnoticed(entry: Path) -> None:
    """Whichever byte of header, padding or block differs, the store or the engine refuses it."""
    toy = Filler()
    seq_id = toy.engine.open(GREEDY)
    sound = entry.read_bytes()
    refused_by_engine = 0
    descriptor = os.open(entry, os.O_RDWR)
    for at in range(len(sound)):
        os.pwrite(descriptor, bytes([sound[at] ^ (1 << at % 8)]), at)
        try:
            _, block = files.map_entry(entry, None)
        except StoreError:
            pass
        else:
            with pytest.raises(StoreError):
                toy.engine.import_kv(seq_id, block)
            refused_by_engine += 1
        os.pwrite(descriptor, sound[at : at + 1], at)
    os.close(descriptor)
    assert toy.engine.num_tokens(seq_id) == 0
    # All of the header is the store's to check, and the head of the block.
    assert refused_by_engine == len(sound) - 16 * 1024 - 64
    toy.engine.import_kv(seq_id, files.map_entry(entry, None)[1])
    assert toy.engine.num_tokens(seq_id) == len(PROMPT)


@pytest.mark.parametrize("is_known", [True, False])
def test_a_changed_entry_is_a_counted_miss(entry: Path, is_known: bool) -> None:
    """Bytes from each part: a store that knows the entry counts it, as does one that opens later.

    The next look-up finds nothing, and the file is gone.
    """
    toy, sound = Filler(), entry.read_bytes()
    for at in [0, 9, 20, 40, 60, 130, 190, 300, 5000, 16 * 1024 - 1, 16 * 1024, len(sound) - 1]:
        entry.write_bytes(sound)
        cache = open_store(entry.parents[1])
        if not is_known:
            cache.close()
        damaged = bytearray(sound)
        damaged[at] ^= 128
        entry.write_bytes(damaged)
        if not is_known:
            cache = open_store(entry.parents[1])
        seq_id, _ = toy.restore(cache, PROMPT)
        assert toy.engine.num_tokens(seq_id) == 0
        toy.engine.close(seq_id)
        cache.flush()
        assert cache.stats().num_damaged == 1
        is_explained = is_known or at >= 16 * 1024
        reason = MissReason.DAMAGED if is_explained else MissReason.NO_ENTRY
        assert cache.find("", ids(PROMPT)).miss is reason
        assert not entry.exists()
        cache.close()
        entry.parent.mkdir(mode=0o700, exist_ok=True)


def test_an_entry_cut_anywhere_is_refused(entry: Path) -> None:
    """However many bytes are left, the file is no entry."""
    sound = entry.read_bytes()
    for length in [*range(0, len(sound), 251), len(sound) - 1]:
        os.truncate(entry, length)
        with pytest.raises(StoreError):
            files.map_entry(entry, None)
        with pytest.raises(StoreError):
            files.read_header(entry)
        entry.write_bytes(sound)
