"""Published rows: what is read, what is derived where a field is missing, and what is refused."""

import json
from typing import Any

import msgspec
import pytest
from support.apple_rows import sample_rows

from brim.cli.forecast import chip_of
from brim.errors import ConfigError
from brim.planner.apple.row_forecast import forecast_row, summarise
from brim.planner.apple.row_shape import shape_of
from brim.planner.apple.rows import (
    MAX_ROWS,
    Row,
    decode_rows,
    depth_tokens_of,
    engine_group,
    setting_of,
)

LLAMA = {
    "layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128, "ffn": 14336,
    "vocab": 128256, "moe": None, "tied_embeddings": False,
}  # fmt: skip


def row(**fields: Any) -> Row:
    base = {"chip": "M4", "kind": "decode", "engine": "llama.cpp", "model": "m", "quant": "Q4_K_M"}
    return msgspec.convert(base | {"arch": LLAMA} | fields, Row)


def test_missing_bytes_are_counted_from_the_architecture() -> None:
    """Without the row's own figures the bytes read are found within a tenth."""
    judged = 0
    for known in sample_rows():
        blank = msgspec.structs.replace(known, read_gib_calc=None, active_gib_calc=None)
        given, derived = shape_of(known), shape_of(blank)
        assert given is not None
        assert derived is not None
        if known.read_gib_calc:
            judged += 1
            assert derived.active_bytes == pytest.approx(given.active_bytes, rel=0.1)
    assert judged > 50


def test_no_size_at_all_follows_from_the_quant() -> None:
    """An 8 B model of Q4_K_M counts as 4.9 GB though the row has no size."""
    shape = shape_of(row())
    assert shape is not None
    assert shape.weights_bytes == pytest.approx(4.92e9, rel=0.03)


def test_a_row_may_say_almost_nothing() -> None:
    """Null fields leave a row without a forecast, not the command without an answer."""
    found = forecast_row(row(arch=None, tok_s=None, gpu_cores=None), chip_of)
    assert found.problem == "the row has no architecture"
    assert not found.is_judged
    unmeasured = forecast_row(row(tok_s=None), chip_of)
    assert unmeasured.forecast_tok_s is not None
    assert unmeasured.error_percent is None
    assert "the chip table has no 'Z80'" in (forecast_row(row(chip="Z80"), chip_of).problem or "")


def test_suspect_rows_and_unknown_bins_do_not_judge() -> None:
    """Only a row that is not suspect, with architecture and GPU cores, counts in a summary."""
    rows = [
        row(tok_s=20.0, gpu_cores=10, suspect=True),
        row(tok_s=20.0),
        row(tok_s=20.0, gpu_cores=10),
    ]
    (summary,) = summarise([forecast_row(item, chip_of) for item in rows])
    assert summary.num_rows == 1


def test_depth_of_a_row_without_one() -> None:
    """Without a mean depth a row counts as its start and half of what it generated."""
    assert depth_tokens_of(row(depth_tokens=1000, n_gen=100)) == 1050
    assert depth_tokens_of(row(avg_kv_tokens=70, depth_tokens=1000)) == 70


@pytest.mark.parametrize(
    ("fields", "group", "is_fused"),
    [
        ({"engine": "llama.cpp", "date": "2024-05", "flash_attn": False}, "llama.cpp before 2025",
         False),
        ({"engine": "llama.cpp", "date": "2026-04"}, "llama.cpp", True),
        ({"engine": "llamafile (LocalScore)", "date": "2025.04"}, "llamafile", False),
        ({"engine": "rapid-mlx"}, "mlx server", True),
        ({"engine": "mlx-lm", "model": "Gemma 2 9B"}, "mlx-lm", False),
        ({"engine": "ollama", "quant": "mlx tag"}, "mlx server", True),
        ({"engine": "ollama", "date": "2024-11"}, "ollama", False),
    ],
)  # fmt: skip
def test_engines_are_grouped(fields: dict[str, Any], group: str, is_fused: bool) -> None:
    """Engine, weights and date decide whose kernels a row measured, and whether they were fused."""
    assert engine_group(row(**fields)) == group
    assert setting_of(row(**fields)).flash_attention is is_fused


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (b"{", "the rows are not JSON"),
        (b"[]", "there are no rows"),
        (b'{"rows": 3}', "there are no rows"),
        (b'[{"chip": "M4"}]', "row 1 cannot be read: Object missing required field"),
        (b'[{"chip": 4, "kind": "decode", "engine": "e", "model": "m"}]', "row 1 cannot be read"),
        (b'[{"chip": "M4", "kind": "x", "engine": "e", "model": "m"}]', "must be decode or"),
        (b"[" * 100_000, "the rows are not JSON"),
        (b"[" + b"0," * MAX_ROWS + b"0]", f"{MAX_ROWS + 1} rows are too many"),
    ],
)  # fmt: skip
def test_bad_rows_are_refused(raw: bytes, sentence: str) -> None:
    """What is no list of rows is refused in one sentence that names the row."""
    with pytest.raises(ConfigError, match=sentence):
        decode_rows(raw)


@pytest.mark.parametrize(
    "change",
    [
        {"layers": 10**9}, {"layers": -1}, {"hidden": 0}, {"heads": "many"}, {"head_dim": 0},
        {"vocab": -5}, {"kv_layers_full": 10**9}, {"moe": {"experts": 0, "active": 8}},
        {"moe": {"experts": 4, "active": 8}}, {"kv_heads": 0}, {"layers": 40, "ffn": -1},
    ],
)  # fmt: skip
def test_impossible_architectures_are_named(change: dict[str, Any]) -> None:
    """An architecture that cannot be is that row's problem, and allocates nothing."""
    found = forecast_row(row(arch=LLAMA | change), chip_of)
    assert found.forecast_tok_s is None
    assert found.problem is not None
    assert "architecture of m" in found.problem


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"read_gib_calc": 1e-12}, "the weights of m come to nothing"),
        ({"gpu_cores": 10**12}, "the chip table has no 'M4 with 1000000000000 GPU cores'"),
        ({"chip": "RTX 4090", "bandwidth_gb_s": 1008}, "the chip table has no 'RTX 4090"),
    ],
)
def test_rows_beyond_any_forecast_say_why(fields: dict[str, Any], problem: str) -> None:
    """Weights of no size and bins that nobody sells are that row's problem, each in its words."""
    found = forecast_row(row(**fields), chip_of)
    assert found.forecast_tok_s is None
    assert (found.problem or "").startswith(problem)


def test_an_unknown_kv_type_is_said() -> None:
    """A KV type that llama.cpp does not have is forecast as f16, and the row says so."""
    plain, odd = (forecast_row(row(kv_type=kv), chip_of) for kv in ("f16", "turbo4"))
    assert odd.forecast_tok_s == plain.forecast_tok_s
    assert (plain.note, odd.note) == (None, "KV type 'turbo4' is not known; taken for f16")


def test_rows_may_stand_in_an_object() -> None:
    """A list under `rows` is read as the list itself, and unknown fields are ignored."""
    item = {"chip": "M4", "kind": "decode", "engine": "e", "model": "m", "stdev": 0.1}
    assert decode_rows(json.dumps({"note": "n", "rows": [item]}).encode())[0].chip == "M4"
