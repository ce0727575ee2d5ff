"""How many prompt rows a step takes, by what steps have cost."""

import pytest

from brim.scheduler.pace import Depths, StepPace


def taught(
    *, row_s: float, decode_s: float = 0.02, num_decode_rows: int = 1, target_s: float = 0.3
) -> StepPace:
    """A pace that has seen steps of one decoding sequence, alone and beside a prompt."""
    pace = StepPace(target_s, 2048)
    for _ in range(20):
        pace.observe(num_decode_rows, 0, decode_s)
        pace.observe(num_decode_rows, 32, decode_s + 32 * row_s)
    return pace


def test_a_mixed_step_comes_nearest_to_the_target_in_whole_tiles() -> None:
    """At 5.5 ms a row and 20 ms of decoding, 48 rows take 0.28 s and 64 would take 0.37."""
    pace = taught(row_s=0.0055)
    assert pace.prefill_rows(1) == 47


@pytest.mark.parametrize("num_decode_rows", [1, 15, 16, 17, 40])
@pytest.mark.parametrize("row_s", [1e-4, 1e-3, 5e-3, 1.0])
def test_rows_are_a_multiple_of_a_tile_and_never_none(num_decode_rows: int, row_s: float) -> None:
    """However slow the machine, a prompt gets rows; all rows together fill tiles."""
    pace = taught(row_s=row_s, num_decode_rows=num_decode_rows)
    num_rows = pace.prefill_rows(num_decode_rows)
    assert num_rows >= 1
    assert (num_rows + num_decode_rows) % 16 == 0 or num_rows == 512


def test_nothing_that_decodes_means_large_chunks() -> None:
    """512 rows where nobody waits, or what the plan allows."""
    assert taught(row_s=0.005).prefill_rows(0) == 512
    assert StepPace(0.3, 100).prefill_rows(0) == 100


def test_time_that_went_into_restoring_is_not_spent_twice() -> None:
    """After 0.2 s of importing KV a step has room for 16 rows instead of 48."""
    pace = taught(row_s=0.0055)
    assert pace.prefill_rows(1, spent_s=0.2) == 15


def test_the_first_mixed_step_is_one_tile_where_nothing_is_known() -> None:
    """A stall on a machine that turns out slow is not risked."""
    assert StepPace(0.3, 2048).prefill_rows(1) == 15


def test_the_rate_of_an_unmixed_prompt_sizes_the_first_mixed_step() -> None:
    """What the decoding client's own prompt took is already knowledge."""
    pace = StepPace(0.3, 2048)
    pace.observe(0, 512, 512 * 0.002)
    assert pace.prefill_rows(1) == 143


def test_slower_steps_are_believed_sooner_than_faster_ones() -> None:
    """One step at half the speed shrinks the chunk more than one at twice the speed grows it."""
    slower, faster = taught(row_s=0.0045), taught(row_s=0.0045)
    before = slower.prefill_rows(1)
    slower.observe(1, 32, 0.02 + 32 * 0.009)
    faster.observe(1, 32, 0.02 + 32 * 0.00225)
    assert before - slower.prefill_rows(1) > faster.prefill_rows(1) - before >= 0


def test_a_suspended_machine_does_not_teach_for_long() -> None:
    """A step of an hour counts as a few times its like, and a few steps later is forgotten."""
    pace = taught(row_s=0.005)
    pace.observe(1, 32, 3600.0)
    for _ in range(15):
        pace.observe(1, 32, 0.02 + 32 * 0.005)
    assert pace.prefill_rows(1) >= 31


def tiled(*, whole_row_s: float | None = None, part_row_s: float = 0.007) -> StepPace:
    """A pace over kernels that take 64 rows together, which has seen parts, and maybe wholes."""
    pace = StepPace(0.3, 2048, 64)
    for _ in range(20):
        pace.observe(1, 0, 0.02)
        pace.observe(1, 31, 0.02 + 31 * part_row_s)
        if whole_row_s is not None:
            pace.observe(1, 63, 0.02 + 63 * whole_row_s)
    return pace


def test_whole_kernel_tiles_may_take_a_fifth_more_than_the_target() -> None:
    """64 rows in 0.35 s are taken where parts cost more for each row; in 0.4 s they are not."""
    assert tiled(whole_row_s=0.0053).prefill_rows(1) == 63
    assert tiled(whole_row_s=0.0061, part_row_s=0.009).prefill_rows(1) == 31


def test_whole_kernel_tiles_are_tried_where_they_may_fit() -> None:
    """Before any was measured they are taken to cost a fifth less than parts."""
    assert tiled(part_row_s=0.0065).prefill_rows(1) == 63
    assert tiled(part_row_s=0.0098).prefill_rows(1) == 31


def test_tiles_that_were_dear_in_a_deep_context_are_tried_again_in_a_shallow_one() -> None:
    """Parts that have become cheap say that the whole has, too."""
    pace = tiled(whole_row_s=0.0100, part_row_s=0.0110)
    assert pace.prefill_rows(1) < 63
    for _ in range(20):
        pace.observe(1, 31, 0.02 + 31 * 0.005)
    assert pace.prefill_rows(1) == 63


@pytest.mark.parametrize(
    ("num_decode_cells", "num_prompt_cells", "num_rows"),
    [
        (450, 0, 47),  # three short answers beside the first rows of a prompt
        (450, 256, 63),  # the prompt's own cells have become as many
        (600, 0, 47),
        (4200, 1280, 47),  # a tile would compute 4,200 cells of others for each row
        (60, 60, 63),
        (0, 0, 63),
    ],
)
def test_cells_of_others_spoil_a_kernel_tile(
    num_decode_cells: int, num_prompt_cells: int, num_rows: int
) -> None:
    """A step stays below a whole tile where its rows would look at too many cells in vain."""
    pace = tiled(whole_row_s=0.0053, part_row_s=0.0053)
    depths = Depths(num_decode_cells, num_prompt_cells)
    assert pace.prefill_rows(1, depths=depths) == num_rows


def test_no_step_is_a_kernel_tile_and_a_part_of_one() -> None:
    """Where whole tiles take too long, 80 rows that cost less each are still 48 at most."""
    pace = tiled(whole_row_s=0.0100, part_row_s=0.0030)
    for _ in range(30):
        pace.observe(1, 63, 0.02 + 63 * 0.0100)
    assert pace.prefill_rows(1) == 47
