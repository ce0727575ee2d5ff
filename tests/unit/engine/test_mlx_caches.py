"""A sequence's caches under real model classes: equal to mlx-lm's, cut, copied, stored."""

import ctypes
import functools
import importlib
from typing import Any

import pytest
from support.mlx_models import FAMILIES, family_dir

from brim.errors import EngineError, StoreError

mx = pytest.importorskip("mlx.core")
cache_state = pytest.importorskip("brim.engine.mlx.cache_state")
caches = pytest.importorskip("brim.engine.mlx.caches")
kv_cache = pytest.importorskip("brim.engine.mlx.kv_cache")
window_kv = pytest.importorskip("brim.engine.mlx.window_kv")
library = pytest.importorskip("brim.engine.mlx.library")
mlx_lm_cache = pytest.importorskip("mlx_lm.models.cache")

TOKENS = [(7919 * place + 13) % 4000 for place in range(400)]

WINDOWED = ("gemma3_text", "gpt_oss")
RECURRENT = ("mamba2", "falcon_h1", "granitemoehybrid", "qwen3_next", "lfm2")
CUTTABLE = ("llama", "qwen2", "qwen3", "qwen3_moe", "deepseek_v3")
QUANTISABLE = ("llama", "qwen2", "gemma3_text", "falcon_h1", "qwen3_next", "lfm2")

PIECES = (50, 7, 30, 1, 1, 1)
"""Rows of successive passes; windows are of 32 tokens."""


@functools.cache
def model_of(family: str) -> Any:
    """A tiny random model, loaded."""
    return library.utils().load_model(family_dir(family))[0]


def maker_of(family: str, kv_type: str = "f16") -> Any:
    return caches.CacheMaker(model_of(family), kv_type=kv_type)


def feed(family: str, sequence: Any, num_tokens: int) -> Any:
    """Logits of the next `num_tokens` of TOKENS, shape (num_tokens, vocab)."""
    start = sequence.num_tokens
    tokens = mx.array([TOKENS[start : start + num_tokens]])
    logits = model_of(family)(tokens, cache=sequence.layers)[0]
    sequence.num_tokens += num_tokens
    mx.eval(logits, sequence.arrays())
    return logits


def filled(family: str, pieces: tuple[int, ...] = PIECES, kv_type: str = "f16") -> Any:
    """A sequence of the first of TOKENS."""
    sequence = maker_of(family, kv_type).new(100)
    for num_tokens in pieces:
        feed(family, sequence, num_tokens)
    return sequence


def goes_on_alike(family: str, one: Any, other: Any) -> bool:
    """Whether two sequences of equal tokens give equal logits, for a piece and a single token."""
    assert one.num_tokens == other.num_tokens
    return all(bool(mx.array_equal(feed(family, one, n), feed(family, other, n))) for n in (3, 1))


def exported(sequence: Any, start: int = 0, end: int | None = None) -> bytearray:
    """The state of tokens [start, end) as bytes."""
    block = bytearray(sequence.export_size(start, end))
    address = ctypes.addressof(ctypes.c_char.from_buffer(block))
    assert sequence.export_into(address, len(block), start, end) == len(block)
    return block


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(WINDOWED)))
def test_logits_are_those_of_mlx_lms_caches(family: str) -> None:
    """Prompt pieces and decode steps give, to the bit, what they give with mlx-lm's own caches."""
    sequence, theirs = maker_of(family).new(100), mlx_lm_cache.make_prompt_cache(model_of(family))
    for num_tokens in PIECES:
        at = sequence.num_tokens
        tokens = mx.array([TOKENS[at : at + num_tokens]])
        wanted = model_of(family)(tokens, cache=theirs)[0]
        assert mx.array_equal(feed(family, sequence, num_tokens), wanted)


@pytest.mark.parametrize("family", WINDOWED)
@pytest.mark.parametrize("pieces", [(1,) * 70, PIECES, (20, *(1,) * 50)])
def test_windows_give_the_logits_of_the_whole_prompt_at_once(
    family: str, pieces: tuple[int, ...]
) -> None:
    """However a prompt is cut, logits are mlx-lm's for all of it in one pass, to the bit."""
    theirs = mlx_lm_cache.make_prompt_cache(model_of(family))
    wanted = model_of(family)(mx.array([TOKENS[:90]]), cache=theirs)[0]
    sequence = maker_of(family).new(None)
    for num_tokens in pieces:
        at = sequence.num_tokens
        assert mx.array_equal(feed(family, sequence, num_tokens), wanted[at : at + num_tokens])


@pytest.mark.parametrize("family", QUANTISABLE)
@pytest.mark.parametrize("kv_type", ["q8_0", "q4_0"])
def test_quantised_logits_are_those_of_mlx_lms_cache(family: str, kv_type: str) -> None:
    """The layers that can be quantised give what mlx-lm's quantised cache gives, to the bit."""
    maker = maker_of(family, kv_type)
    sequence = maker.new(100)
    bits = kv_cache.KV_BITS[kv_type]
    theirs = maker_of(family).new(100).layers
    ours = [leaf for leaf in caches.leaves_of(sequence.layers) if hasattr(leaf, "bits")]
    assert len(ours) == maker.num_quantised_layers > 0
    group_size = 32 if family in ("qwen2", "lfm2") else 64
    assert {leaf.group_size for leaf in ours} == {group_size}
    swap(theirs, lambda: mlx_lm_cache.QuantizedKVCache(group_size, bits))
    for num_tokens in PIECES:
        at = sequence.num_tokens
        wanted = model_of(family)(mx.array([TOKENS[at : at + num_tokens]]), cache=theirs)[0]
        assert mx.array_equal(feed(family, sequence, num_tokens), wanted)


def swap(layers: list[Any], make: Any) -> None:
    """Put a new cache in the place of every plain one."""
    for index, layer in enumerate(layers):
        if type(layer) is kv_cache.PlainKV:
            layers[index] = make()
        elif isinstance(layer, mlx_lm_cache.CacheList):
            parts = list(layer.caches)
            swap(parts, make)
            layer.caches = tuple(parts)


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "mamba2"])
def test_what_cannot_be_quantised_says_so(family: str) -> None:
    """Attention with sinks, latent attention and recurrent state have no quantised form."""
    assert maker_of(family).num_quantised_layers == 0
    with pytest.raises(EngineError, match="use f16"):
        maker_of(family, "q8_0")


def test_an_unknown_kv_type_is_named() -> None:
    """A type that MLX lacks is refused with those that it has."""
    with pytest.raises(EngineError, match="no KV type q5_1; use one of f16, q8_0, q4_0"):
        maker_of("llama", "q5_1")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_can_be_cut_is_known_beforehand(family: str) -> None:
    """Only models whose layers keep all keys and values promise any prefix."""
    maker = maker_of(family)
    assert maker.is_known
    assert maker.can_truncate == maker.can_fork_prefix == (family in CUTTABLE)


@pytest.mark.parametrize("family", CUTTABLE)
def test_a_truncated_sequence_goes_on_like_a_new_one(family: str) -> None:
    """What was cut leaves no trace."""
    sequence = filled(family)
    sequence.truncate(50)
    assert goes_on_alike(family, sequence, filled(family, (50,)))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_sequence_cut_to_nothing_starts_anew(family: str) -> None:
    """Zero tokens can always be kept."""
    sequence = filled(family)
    sequence.truncate(0)
    assert sequence.num_tokens == 0
    assert goes_on_alike(family, sequence, maker_of(family).new(100))


@pytest.mark.parametrize("family", [*WINDOWED, *RECURRENT])
def test_state_that_cannot_be_cut_is_refused_untouched(family: str) -> None:
    """The refusal says what the model keeps, and the sequence goes on as before."""
    sequence = filled(family, (340,))
    assert not sequence.can_cut(20)
    for attempt in (sequence.truncate, lambda n: sequence.fork(n, None)):
        with pytest.raises(EngineError, match="20 of 340 tokens cannot be kept"):
            attempt(20)
    assert goes_on_alike(family, sequence, filled(family, (340,)))


@pytest.mark.parametrize("family", WINDOWED)
def test_a_window_that_has_let_nothing_go_can_be_cut(family: str) -> None:
    """A short sequence of a model with windows keeps any prefix, though none is promised."""
    sequence = filled(family)
    assert sequence.can_cut(20)
    fork = sequence.fork(20, 100)
    sequence.truncate(20)
    assert goes_on_alike(family, sequence, filled(family, (20,)))
    assert goes_on_alike(family, fork, filled(family, (20,)))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_whole_fork_goes_on_like_its_source(family: str) -> None:
    """A fork and its source continue alike, each on its own."""
    source = filled(family)
    fork = source.fork(source.num_tokens, None)
    feed(family, source, 9)
    assert goes_on_alike(family, fork, filled(family))
    assert goes_on_alike(family, source, filled(family, (*PIECES, 9)))


@pytest.mark.parametrize("family", CUTTABLE)
@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_a_fork_of_a_prefix_is_the_prefix(family: str, kv_type: str) -> None:
    """A fork may be cut anywhere, and takes memory for its own bound only."""
    if family == "deepseek_v3" and kv_type != "f16":
        pytest.skip("latent attention cannot be quantised")
    source = filled(family, kv_type=kv_type)
    fork = source.fork(57, 64)
    assert 2 * fork.nbytes == source.nbytes
    assert goes_on_alike(family, fork, filled(family, (50, 7), kv_type))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_step_can_be_rolled_back(family: str) -> None:
    """A token that was fed and not wanted leaves no trace, whether it was computed or not."""
    sequence, twin = filled(family), filled(family)
    checkpoint = sequence.checkpoint()
    feed(family, sequence, 1)
    sequence.roll_back(checkpoint)
    model_of(family)(mx.array([[5]]), cache=sequence.layers)
    sequence.num_tokens += 1
    sequence.roll_back(checkpoint)
    assert goes_on_alike(family, sequence, twin)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_stored_state_goes_on_like_its_source(family: str) -> None:
    """An import continues as its export would have, and holds exactly what was held."""
    source = filled(family)
    block = exported(source)
    target = maker_of(family).new(100)
    target.import_from(memoryview(block), source.num_tokens)
    assert exported(target) == block
    assert goes_on_alike(family, target, source)


@pytest.mark.parametrize("kv_type", ["q8_0", "q4_0"])
def test_quantised_state_can_be_stored(kv_type: str) -> None:
    """Quantised rows are stored as they are, in bytes that the type accounts for."""
    source = filled("llama", kv_type=kv_type)
    block = exported(source)
    target = maker_of("llama", kv_type).new(None)
    target.import_from(memoryview(block), source.num_tokens)
    assert goes_on_alike("llama", target, source)


@pytest.mark.parametrize("family", CUTTABLE)
@pytest.mark.parametrize("kv_type", ["f16", "q4_0"])
@pytest.mark.parametrize("bound", [None, 60, 100])
def test_a_stored_part_continues_what_is_held(family: str, kv_type: str, bound: int | None) -> None:
    """Parts that are appended to a fork equal what was read, wherever they were parted."""
    if family == "deepseek_v3" and kv_type != "f16":
        pytest.skip("latent attention cannot be quantised")
    source = filled(family, kv_type=kv_type)
    target = source.fork(31, bound)
    for start, end in ((31, 32), (32, 70), (70, 90)):
        target.import_from(memoryview(exported(source, start, end)), end)
        assert target.num_tokens == end
    assert exported(target) == exported(source)
    assert goes_on_alike(family, target, source)


def test_a_part_goes_into_the_cells_that_are_there() -> None:
    """An append within the bound copies no buffer, not even for a moment: measured."""
    source = filled("llama")
    target = source.fork(31, 8192)
    block = memoryview(exported(source, 31, 90))
    taken = target.nbytes
    buffer_bytes = min(part.nbytes for layer in target.layers for part in layer.parts)
    active_bytes = mx.get_active_memory()
    mx.reset_peak_memory()
    target.import_from(block, 90)
    assert target.nbytes == taken
    assert mx.get_peak_memory() - active_bytes < buffer_bytes // 2
    assert goes_on_alike("llama", target, source)


def test_a_part_of_another_place_is_refused() -> None:
    """A block is appended where it was taken from alone; what is held stays as it is."""
    source = filled("llama")
    block, target = exported(source, 40, 60), source.fork(30, 100)
    for num_tokens in (50, 60):
        with pytest.raises(StoreError, match="other tokens"):
            target.import_from(memoryview(block), num_tokens)
    with pytest.raises(StoreError, match="other tokens"):
        maker_of("llama").new(100).import_from(memoryview(block), 60)
    assert target.num_tokens == 30
    assert goes_on_alike("llama", target, filled("llama", (30,)))


def test_a_part_that_fails_half_way_leaves_what_was_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that were filled before memory ran out are cut back."""
    source = filled("llama")
    target = source.fork(30, 100)
    fill, calls = cache_state._fill, iter(range(2))

    def fails_the_second_time(*args: Any) -> None:
        if next(calls) == 1:
            raise MemoryError
        fill(*args)

    with monkeypatch.context() as patched:
        patched.setattr(cache_state, "_fill", fails_the_second_time)
        with pytest.raises(MemoryError):
            target.import_from(memoryview(exported(source, 30, 90)), 90)
    assert target.num_tokens == 30
    assert goes_on_alike("llama", target, filled("llama", (30,)))


def test_a_new_bound_is_taken_at_once_when_there_is_need() -> None:
    """A sequence that is to hold more grows to that in one go, and not before."""
    sequence = filled("llama")
    taken = sequence.nbytes
    sequence.expect(300)
    feed("llama", sequence, 20)
    assert sequence.nbytes == taken
    feed("llama", sequence, 40)
    grown = sequence.nbytes
    assert grown == taken * kv_cache.padded_tokens(300) // kv_cache.padded_tokens(100)
    feed("llama", sequence, 150)
    assert sequence.nbytes == grown


def test_half_precision_is_stored_bit_by_bit() -> None:
    """A bfloat16 model's state, a type that numpy lacks, survives the way to bytes and back."""
    model = library.utils().load_model(family_dir("llama", dtype="bfloat16"))[0]
    maker = caches.CacheMaker(model, kv_type="f16")
    source, target = maker.new(70), maker.new(None)
    model(mx.array([TOKENS[:70]]), cache=source.layers)
    source.num_tokens = 70
    target.import_from(memoryview(exported(source)), 70)
    for one, twin in zip(source.layers, target.layers, strict=True):
        for mine, other in zip(one.keys_and_values(), twin.keys_and_values(), strict=True):
            assert mine.dtype == mx.bfloat16
            assert mx.array_equal(mine, other)


def test_an_empty_sequence_can_be_stored() -> None:
    """No tokens are a state as well."""
    block = exported(maker_of("falcon_h1").new(10))
    target = maker_of("falcon_h1").new(10)
    target.import_from(memoryview(block), 0)
    assert goes_on_alike("falcon_h1", target, maker_of("falcon_h1").new(10))


def test_an_export_is_no_larger_than_what_is_held() -> None:
    """Unused cells, and tokens that a window let go, are not written."""
    sequence = filled("gemma3_text")
    row_bytes = 2 * 2 * 64 * 4
    held = 2 * 90 * row_bytes + 2 * (31 + window_kv.ROLL_BACK_TOKENS) * row_bytes
    assert held < sequence.export_size() < held + 2000


def test_a_state_of_another_model_or_type_is_refused() -> None:
    """Layers of other kinds, shapes, types or lengths are refused, and the caches left empty."""
    target = maker_of("llama").new(100)
    blocks = [
        (exported(filled("gemma3_text")), 90),
        (exported(filled("qwen2")), 90),
        (exported(filled("llama", kv_type="q8_0")), 90),
        (exported(filled("llama")), 89),
    ]
    for block, num_tokens in blocks:
        with pytest.raises(StoreError):
            target.import_from(memoryview(block), num_tokens)
        assert (target.num_tokens, target.nbytes) == (0, 0)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "falcon_h1"])
def test_a_damaged_description_is_refused(family: str) -> None:
    """Cut, lengthened or altered descriptions raise StoreError and nothing else."""
    block = bytes(exported(filled(family)))
    end = block.index(b"  ")
    damaged = [b"", block[:5], block[:40], block[:-1], block + b"\0", b"\xff" * 8 + block[8:]]
    changed = [at for at in range(8, end, 5) if block[at] != ord("7")]
    damaged += [block[:at] + b"7" + block[at + 1 :] for at in changed]
    target = maker_of(family).new(100)
    for wrong in damaged:
        with pytest.raises(StoreError):
            target.import_from(memoryview(wrong), 90)
        assert (target.num_tokens, target.nbytes) == (0, 0)


def test_an_import_that_fails_half_way_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that were filled before memory ran out are given back."""
    block = exported(filled("llama"))
    fill, calls = cache_state._fill, iter(range(2))

    def fails_the_second_time(*args: Any) -> None:
        if next(calls) == 1:
            raise MemoryError
        fill(*args)

    monkeypatch.setattr(cache_state, "_fill", fails_the_second_time)
    target = maker_of("llama").new(100)
    with pytest.raises(MemoryError):
        target.import_from(memoryview(block), 90)
    assert (target.num_tokens, target.nbytes) == (0, 0)


def test_too_little_room_for_an_export_is_refused() -> None:
    """Nothing is written past the end of what was given."""
    sequence = filled("llama")
    room = bytearray(100)
    address = ctypes.addressof(ctypes.c_char.from_buffer(room))
    with pytest.raises(StoreError, match="there is room for 100"):
        sequence.export_into(address, len(room))
    assert room == bytearray(100)


@functools.cache
def chunked_model() -> Any:
    """A tiny Llama 4: three layers look back to the start of a chunk of 16, one to all."""
    config = {
        "attention_bias": False, "attention_chunk_size": 16, "head_dim": 32, "hidden_size": 64,
        "interleave_moe_layer_step": 2, "intermediate_size": 64, "intermediate_size_mlp": 64,
        "max_position_embeddings": 512, "model_type": "llama4_text", "num_attention_heads": 2,
        "num_experts_per_tok": 1, "num_hidden_layers": 4, "num_key_value_heads": 1,
        "num_local_experts": 2, "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 10000.0,
        "use_qk_norm": True, "vocab_size": 4096,
    }  # fmt: skip
    llama4 = importlib.import_module("mlx_lm.models.llama4")
    return llama4.Model(llama4.ModelArgs(config, "llama4"))


def test_chunks_give_the_logits_of_mlx_lms_caches() -> None:
    """A chunked layer reads what mlx-lm's chunked cache holds; stored and rolled back as well."""
    maker = caches.CacheMaker(chunked_model(), kv_type="f16")
    assert maker.kinds == ("chunks of 16 tokens", "all keys and values")
    assert maker.is_known and not maker.can_truncate
    sequence, theirs = maker.new(None), mlx_lm_cache.make_prompt_cache(chunked_model())
    for num_tokens in (10, *(1,) * 12, 30, 300, 1, 1):
        at = sequence.num_tokens
        tokens = mx.array([TOKENS[at : at + num_tokens]])
        checkpoint = sequence.checkpoint()
        chunked_model()(mx.array([[3]]), cache=sequence.layers)
        sequence.num_tokens += 1
        sequence.roll_back(checkpoint)
        logits = chunked_model()(tokens, cache=sequence.layers)
        sequence.num_tokens += num_tokens
        assert mx.array_equal(logits, chunked_model()(tokens, cache=theirs))
    stored = maker.new(None)
    stored.import_from(memoryview(exported(sequence)), sequence.num_tokens)
    last = mx.array([[5]])
    assert mx.array_equal(
        chunked_model()(last, cache=stored.layers), chunked_model()(last, cache=theirs)
    )


class Unknown:
    """A cache of a kind that brim has not seen."""

    def __init__(self) -> None:
        self.offset = 0
        self.keys: Any = None
        self.values: Any = None

    def update_and_fetch(self, keys: Any, values: Any) -> tuple[Any, Any]:
        if self.offset:
            keys, values = (
                mx.concatenate(both, axis=2) for both in ((self.keys, keys), (self.values, values))
            )
        self.offset, self.keys, self.values = keys.shape[2], keys, values
        return keys, values

    def make_mask(self, num_tokens: int, **options: Any) -> Any:
        return mlx_lm_cache.create_attention_mask(
            num_tokens, self.offset, options["return_array"], options["window_size"]
        )

    @property
    def state(self) -> Any:
        return (self.keys, self.values) if self.offset else ()


class WithUnknown:
    """A model whose caches are of an unknown kind."""

    def make_cache(self) -> list[Any]:
        return [Unknown() for _ in model_of("llama").layers]

    def __call__(self, tokens: Any, cache: Any) -> Any:
        return model_of("llama")(tokens, cache=cache)


def test_caches_of_an_unknown_kind_are_left_as_they_are() -> None:
    """They can be fed, forked whole, rolled back and dropped; the rest is refused in words."""
    maker = caches.CacheMaker(WithUnknown(), kv_type="f16")
    assert not (maker.is_known or maker.can_truncate or maker.can_quantise)
    assert maker.kinds == ("Unknown",)
    sequence = maker.new(100)
    feed("llama", sequence, 50)
    fork = sequence.fork(50, None)
    checkpoint = sequence.checkpoint()
    feed("llama", sequence, 7)
    sequence.roll_back(checkpoint)
    assert goes_on_alike("llama", sequence, filled("llama", (50,)))
    assert goes_on_alike("llama", fork, filled("llama", (50,)))
    with pytest.raises(EngineError, match="cannot be kept"):
        fork.truncate(20)
    with pytest.raises(StoreError, match="Unknown cannot be stored"):
        fork.export_size()


class Shared:
    """A model of which two layers read one cache, and one has none."""

    def make_cache(self) -> list[Any]:
        first = mlx_lm_cache.KVCache()
        return [first, None, first, mlx_lm_cache.CacheList(first, mlx_lm_cache.KVCache())]

    def __call__(self, tokens: Any, cache: Any) -> None:
        rows = mx.ones((1, 1, tokens.shape[1], 64))
        cache[0].update_and_fetch(rows, rows)
        cache[3][1].update_and_fetch(2 * rows, 3 * rows)


def test_layers_that_share_a_cache_share_ours() -> None:
    """A cache that stands in several places is one, in forks as well, and is counted once."""
    maker = caches.CacheMaker(Shared(), kv_type="f16")
    sequence = maker.new(64)
    Shared()(mx.zeros((1, 3), mx.int32), sequence.layers)
    sequence.num_tokens = 3
    for one in (sequence, sequence.fork(2, 64)):
        assert one.layers[0] is one.layers[2] is one.layers[3][0]
        assert one.layers[1] is None
        assert one.nbytes == 2 * 2 * 64 * 64 * 4
    assert maker.num_quantised_layers == 2
