"""What one attention layer keeps, compared with mlx-lm's own caches of one sequence."""

from typing import Any

import pytest

mx = pytest.importorskip("mlx.core")
kv = pytest.importorskip("brim.engine.mlx.kv_cache")
window_kv = pytest.importorskip("brim.engine.mlx.window_kv")
mlx_lm_cache = pytest.importorskip("mlx_lm.models.cache")

HEADS, WIDTH, WINDOW = 2, 64, 20

PIECES = (3, 1, 1, 40, 1, 300, 1, 1, 7)
"""Rows of successive updates: decode steps, prompt pieces, and one larger than any slack."""


def rows(num_tokens: int, seed: int = 0, dtype: Any = None) -> Any:
    """New rows, distinct for every seed."""
    key = mx.random.key(seed)
    return mx.random.normal((1, HEADS, num_tokens, WIDTH), dtype or mx.float32, key=key)


def equal(left: Any, right: Any) -> bool:
    """Whether two arrays, or two tuples of arrays, are the same to the bit."""
    if isinstance(left, mx.array):
        return bool(mx.array_equal(left, right))
    return all(equal(one, other) for one, other in zip(left, right, strict=True))


def flat(parts: Any) -> list[Any]:
    """The arrays of what an update returns."""
    return [parts] if isinstance(parts, mx.array) else [one for part in parts for one in flat(part)]


def updates(cache: Any, pieces: tuple[int, ...] = PIECES, dtype: Any = None) -> list[Any]:
    """What each update returns; every cache that is given the same pieces gets the same rows."""
    return [
        cache.update_and_fetch(rows(n, 2 * step, dtype), rows(n, 2 * step + 1, dtype))
        for step, n in enumerate(pieces)
    ]


@pytest.mark.parametrize("capacity", [None, 100, 512])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plain_keys_and_values_are_those_of_mlx_lm(capacity: int | None, dtype: str) -> None:
    """Every update returns what mlx-lm's own cache returns, whatever the capacity."""
    ours = updates(kv.PlainKV(capacity), dtype=getattr(mx, dtype))
    theirs = updates(mlx_lm_cache.KVCache(), dtype=getattr(mx, dtype))
    assert equal(ours, theirs)


@pytest.mark.parametrize("capacity", [None, 100])
@pytest.mark.parametrize(("bits", "group_size"), [(8, 64), (4, 64), (8, 32), (4, 32)])
def test_quantised_parts_are_those_of_mlx_lm(
    bits: int, group_size: int, capacity: int | None
) -> None:
    """Quantised data, scales and biases are mlx-lm's to the bit."""
    ours = kv.QuantisedKV(bits, group_size, capacity)
    theirs = mlx_lm_cache.QuantizedKVCache(group_size, bits)
    assert equal(updates(ours), updates(theirs))
    assert (ours.bits, ours.group_size) == (bits, group_size)


def test_only_quantised_caches_have_bits() -> None:
    """mlx-lm's attention takes a cache with `bits` for a quantised one."""
    assert not hasattr(kv.PlainKV(), "bits")
    assert not hasattr(window_kv.WindowKV(WINDOW), "bits")


@pytest.mark.parametrize("num_held", [0, 5, 19, 20, 50])
@pytest.mark.parametrize("num_rows", [1, 2, 30])
@pytest.mark.parametrize("as_array", [False, True])
@pytest.mark.parametrize("window_size", [None, WINDOW])
def test_masks_are_those_of_mlx_lm(
    num_held: int, num_rows: int, as_array: bool, window_size: int | None
) -> None:
    """Plain, quantised and window caches ask for the masks that mlx-lm's ask for."""
    pairs = [
        (kv.PlainKV(), mlx_lm_cache.KVCache()),
        (kv.QuantisedKV(8, 64), mlx_lm_cache.QuantizedKVCache(64, 8)),
        (window_kv.WindowKV(WINDOW), mlx_lm_cache.RotatingKVCache(WINDOW)),
    ]
    for ours, theirs in pairs:
        updates(ours, (1,) * num_held)
        updates(theirs, (1,) * num_held)
        options = {"return_array": as_array, "window_size": window_size}
        mask = ours.make_mask(num_rows, **options)
        wanted = theirs.make_mask(num_rows, **options)
        assert mask is wanted or mask == wanted if isinstance(wanted, str | None) else True
        if isinstance(wanted, mx.array):
            assert equal(mask, wanted)


def test_a_window_narrower_than_its_cache_is_masked_in_order() -> None:
    """A decoded row sees the last tokens of the narrower window, and no others."""
    cache = window_kv.WindowKV(WINDOW)
    updates(cache, (1,) * 30)
    mask = cache.make_mask(1, window_size=4)
    assert mask.tolist() == [[False] * 16 + [True] * 4]


def test_memory_is_taken_once_at_the_admitted_bound() -> None:
    """Capacity is rounded up to whole blocks and does not change until it is exceeded."""
    cache = kv.PlainKV(100)
    bytes_per_token = 2 * HEADS * WIDTH * 4
    updates(cache, (1,))
    assert cache.nbytes == 128 * bytes_per_token
    updates(cache, (127,))
    assert cache.nbytes == 128 * bytes_per_token
    updates(cache, (1,))
    assert cache.nbytes == kv.GROWTH_TOKENS * bytes_per_token


def test_a_cache_of_unknown_length_grows_by_blocks() -> None:
    """Without a bound a cache takes a block when it needs one."""
    cache = kv.PlainKV()
    updates(cache, (1,))
    assert cache.parts[0].shape[2] == kv.GROWTH_TOKENS
    updates(cache, (kv.GROWTH_TOKENS,))
    assert cache.parts[0].shape[2] == 2 * kv.GROWTH_TOKENS


def test_quantised_memory_is_that_of_the_planned_types() -> None:
    """In half precision 8 bits take 8.5 a value and 4 bits 4.5, in groups of 64."""
    for name, bits in kv.KV_BITS.items():
        cache = kv.QuantisedKV(bits, 64, 64)
        updates(cache, (1,), mx.float16)
        assert cache.nbytes * 8 == 2 * 64 * HEADS * WIDTH * {"q8_0": 8.5, "q4_0": 4.5}[name]


# A window's 320 cells are full after 320 tokens; it then keeps 35 of them.
FULL = (310, *(1,) * 10)


@pytest.mark.parametrize("pieces", [PIECES, (*FULL, 1, 1, 1), (*FULL, 7), (330,), (5, 290, 30, 3)])
def test_a_window_sees_the_last_tokens_in_their_order(pieces: tuple[int, ...]) -> None:
    """Each update returns the rows that its first new row may see, up to its last, in order."""
    fetched = updates(window_kv.WindowKV(WINDOW), pieces)
    everything = updates(mlx_lm_cache.KVCache(), pieces)
    end = 0
    for ours, whole, num_rows in zip(fetched, everything, pieces, strict=True):
        start = max(0, end - WINDOW + 1)
        end += num_rows
        assert equal(ours, [part[..., start:end, :] for part in whole])


def test_a_window_sees_the_tokens_that_a_rotating_cache_sees() -> None:
    """mlx-lm's rotating cache holds the same rows, in another order."""
    ours, theirs = window_kv.WindowKV(WINDOW), mlx_lm_cache.RotatingKVCache(WINDOW)
    pieces = (7, *(1,) * 50)
    mine, other = updates(ours, pieces)[-1], updates(theirs, pieces)[-1]
    for one, twin in zip(mine, other, strict=True):
        assert sorted(one[0, 0].tolist()) == sorted(twin[0, 0].tolist())
    assert ours.size() == theirs.size() == WINDOW


def test_a_window_takes_no_more_than_its_cells() -> None:
    """A window's buffers stay at window and slack, however long the sequence and its pieces."""
    cache = window_kv.WindowKV(WINDOW, 5000)
    bytes_per_token = 2 * HEADS * WIDTH * 4
    for pieces in ((1,), (2000,), (100, 200, 300), FULL):
        updates(cache, pieces)
        assert cache.nbytes == window_kv.mlx_window_cells(WINDOW) * bytes_per_token
    short = window_kv.WindowKV(WINDOW, 40)
    updates(short, (40,))
    assert short.nbytes == 64 * bytes_per_token


@pytest.mark.parametrize("pieces", [FULL, (*FULL, 1), (2000,), (300, 30), (30, 300)])
def test_the_last_tokens_of_a_window_can_be_taken_back(pieces: tuple[int, ...]) -> None:
    """After a roll back the next row sees what it would have seen, also just after a move."""
    for num_back in range(1, window_kv.ROLL_BACK_TOKENS + 1, 5):
        cache, whole = window_kv.WindowKV(WINDOW), mlx_lm_cache.KVCache()
        updates(cache, pieces)
        updates(whole, pieces)
        assert cache.is_trimmable(num_back)
        assert cache.trim(num_back) == whole.trim(num_back) == num_back
        new = (rows(1, 98), rows(1, 99))
        wanted = [part[..., -WINDOW:, :] for part in whole.update_and_fetch(*new)]
        assert equal(cache.update_and_fetch(*new), wanted)


def test_a_window_that_let_tokens_go_cannot_be_cut_far_back() -> None:
    """Only what the window still covers can be kept, and nothing at all always can."""
    cache = window_kv.WindowKV(WINDOW)
    updates(cache, (1000,))
    assert cache.is_trimmable(window_kv.ROLL_BACK_TOKENS)
    assert not cache.is_trimmable(window_kv.ROLL_BACK_TOKENS + 1)
    assert cache.is_trimmable(1000)


@pytest.mark.parametrize("make", [kv.PlainKV, lambda: window_kv.WindowKV(WINDOW)])
def test_layers_that_share_a_cache_get_what_its_update_returned(make: Any) -> None:
    """`keys_and_values` repeats the last update, a piece larger than a window's slack included."""
    cache = make()
    for num_rows in PIECES:
        (fetched,) = updates(cache, (num_rows,))
        assert equal(cache.keys_and_values(), fetched)


def test_what_lies_beside_a_window_is_let_go() -> None:
    """After a step nothing but the buffers keeps memory."""
    cache = window_kv.WindowKV(WINDOW)
    updates(cache, (1000,))
    cache.settle()
    assert cache.keys_and_values()[0].shape[2] < 1000


def test_heads_without_a_common_group_cannot_be_quantised() -> None:
    """Groups of 64 come first, then of 32; other widths have none."""
    assert kv.group_size_for(128, 64) == 64
    assert kv.group_size_for(96, 64) == 32
    assert kv.group_size_for(80, 80) is None


@pytest.mark.parametrize("make", [kv.PlainKV, lambda n: kv.QuantisedKV(8, 64, n)])
def test_a_step_writes_in_place(make: Any) -> None:
    """Steps that are built ahead, and launched when the one before has ended, copy no buffer."""
    cache = make(4096)
    updates(cache, (1000,))
    mx.eval(cache.parts)
    smallest = min(part.nbytes for part in cache.parts)
    held = mx.get_active_memory()
    mx.reset_peak_memory()

    def step(number: int) -> Any:
        fetched = cache.update_and_fetch(rows(1, number), rows(1, number + 1))
        newest = [part[..., -1:, :].astype(mx.float32).sum() for part in flat(fetched)]
        return mx.stack(newest)

    running = step(0)
    mx.async_eval(running)
    for number in range(1, 6):
        ahead = step(number)
        mx.eval(running)
        mx.async_eval(ahead)
        running = ahead
    mx.eval(running)
    assert mx.get_active_memory() - held < smallest
    assert mx.get_peak_memory() - held < smallest
