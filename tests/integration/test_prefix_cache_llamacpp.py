"""llama.cpp's own blocks in the store: restored equals recomputed, and damage is never taken."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import require_engine
from support.driver import GREEDY
from support.models import plan_for
from support.prefixes import Filler, ids, open_store

from brim.engine.factory import create
from brim.errors import StoreError
from brim.prefix_cache import files
from brim.prefix_cache.store import Model, PrefixCache

PROMPT = [(7 * i) % 300 + 5 for i in range(96)]


@pytest.fixture(scope="module")
def filler() -> Iterator[Filler]:
    require_engine("llamacpp")
    engine = create("llamacpp")
    engine.load(plan_for("llamacpp"))
    yield Filler(engine)
    engine.shutdown()


def open_for(filler: Filler, directory: Path) -> PrefixCache:
    engine = filler.engine
    model = Model(name="pystd", paths=(), identity=engine.kv_identity)
    return open_store(
        directory,
        model=model,
        can_cut=engine.capabilities.can_truncate,
        can_export_range=engine.capabilities.can_export_range,
    )


def test_restored_prompts_go_on_to_the_bit(filler: Filler, tmp_path: Path) -> None:
    """After a restart, whole prompts, cut ones and branches give the logits of a new reading."""
    cache = open_for(filler, tmp_path / "c")
    branch = [*PROMPT[:64], *range(20, 60)]
    for tokens in (PROMPT[:48], PROMPT, branch):
        assert filler.keep(cache, tokens)
    cache.close()
    again = open_for(filler, tmp_path / "c")
    for tokens in (PROMPT, branch, PROMPT[:80], [*PROMPT[:30], 1, 2, 3]):
        expected = 30 if tokens[-1] == 3 else len(tokens)
        assert filler.assert_restores(again, tokens) == expected
    again.close()


def test_no_sampled_byte_can_change_unnoticed(filler: Filler, tmp_path: Path) -> None:
    """400 bytes over header and state: each change is refused, and the sequence stays empty."""
    cache = open_for(filler, tmp_path / "c")
    assert filler.keep(cache, PROMPT)
    cache.close()
    (path,) = (tmp_path / "c").glob("*/*.kv")
    sound = path.read_bytes()
    seq_id = filler.engine.open(GREEDY)
    for at in [*range(0, 200, 2), *range(200, len(sound), len(sound) // 300)]:
        damaged = bytearray(sound)
        damaged[at] ^= 1 << (at % 8)
        path.write_bytes(damaged)
        with pytest.raises(StoreError):
            filler.engine.import_kv(seq_id, files.map_entry(path, None)[1])
        assert filler.engine.num_tokens(seq_id) == 0
    filler.engine.close(seq_id)
    path.write_bytes(sound)
    whole = open_for(filler, tmp_path / "c")
    assert filler.assert_restores(whole, PROMPT) == len(PROMPT)
    assert whole.find("", ids(PROMPT)).miss is None
    whole.close()
