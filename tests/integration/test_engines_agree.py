"""The MLX engine and llama.cpp give the same weights the same meaning, within what is published."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from conftest import require_engine
from support.models import PYSTD_1M, TESTS

ROOT = TESTS.parent
BENCHES = ROOT / "benches"

MAX_MEAN_KLD = 0.01
"""Of q8_0 KV, in nats."""


def output_of(script: str, *arguments: str) -> list[dict[str, Any]]:
    require_engine("mlx")
    require_engine("llamacpp")
    done = subprocess.run(
        [sys.executable, str(BENCHES / script), "--json", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_argmaxes_agree_teacher_forced() -> None:
    """Along llama.cpp's tokens on an F16 GGUF file of the same weights, MLX's argmax is the same.

    Or llama.cpp's own gap is at most twice the largest difference that is published.
    """
    published = json.loads((ROOT / "docs" / "equality.json").read_text())
    rows = output_of("equality.py", "--profile", "shipping", str(PYSTD_1M))
    assert len(rows) == 4
    for row in rows:
        e = published[row["model"]][row["options"]]
        assert row["max_gap_at_disagreement"] <= 2 * e, row
        # Another processor adds in another order; a wrong rope or scale moves logits by units.
        assert row["max_logit_difference"] <= 2 * e, row


def test_eight_bit_kv_costs_next_to_nothing() -> None:
    """In batches, q8_0 KV moves distributions by less than 0.01 nats; q4_0 KV moves them more."""
    text = str(BENCHES / "kv_quality.py")
    rows = output_of("kv_quality.py", "--text", text, "--tokens", "16", str(PYSTD_1M))
    by_type = {row["kv_type"]: row for row in rows}
    assert 0 < by_type["q8_0"]["mean_kld"] < MAX_MEAN_KLD
    assert by_type["q8_0"]["mean_kld"] < by_type["q4_0"]["mean_kld"]


def test_the_page_shows_what_is_published() -> None:
    """The table of docs/equality.md is made of docs/equality.json."""
    bench = imported(BENCHES / "equality.py")
    page = (ROOT / "docs" / "equality.md").read_text()
    published = json.loads((ROOT / "docs" / "equality.json").read_text())
    assert bench.page_with(page, published) == page
    assert "| pystd-1m | `mlx kv=f16` |" in page


def imported(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Frozen dataclasses look their own module up.
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module
