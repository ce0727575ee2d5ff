"""What brim promises beside another server, as limits on figures, and the page they stand on."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from brim.bench.serving.report import Report, Sample, ServerNote, rows
from brim.bench.serving.session import Asked, Figure
from brim.bench.serving.sizes import Sizes

SCRIPT = Path(__file__).parents[3] / "benches" / "serving_promises.py"


@pytest.fixture(scope="module")
def promises() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("serving_promises", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["serving_promises"] = module  # msgspec looks annotations up there
    spec.loader.exec_module(module)
    return module


def report(workload: str, brim: dict[str, float], other: dict[str, float]) -> Report:
    asked = Asked(label="x", num_prompt_tokens=1, num_completion_tokens=1, is_same_text=True)
    samples = [
        Sample(
            workload=workload,
            server=server,
            repetition=0,
            duration_s=1.0,
            figures=tuple(Figure(name=name, value=value) for name, value in figures.items()),
            asked=(asked,),
        )
        for server, figures in (("llama-server", other), ("brim", brim))
    ]
    return Report(
        machine="a machine",
        started_at="2026-01-01T00:00:00+00:00",
        seed=1,
        reference="llama-server",
        servers=tuple(
            ServerNote(name=name, command="c", model="m", takes_ignore_eos=True)
            for name in ("llama-server", "brim")
        ),
        sizes=Sizes(),
        repetitions=1,
        was_interrupted=False,
        complaints=(),
        samples=tuple(samples),
        rows=tuple(rows(samples, "llama-server")),
    )


def test_limits_are_judged_from_their_own_side(promises: ModuleType) -> None:
    """A rate must not be below its limit, a time not above, and what is missing is no pass."""
    published = promises.Published()
    throughput = {"output_tok_s": 90.0, "ttft_p50_s": 5.0}
    published.take("decode", report("throughput", throughput, dict.fromkeys(throughput, 100.0)))
    published.take("decode", report("stall", {"longest_gap_s": 0.3, "ttft_growth": 1.4}, {}))
    found = {words: verdict for words, _, _, verdict in promises.verdicts(published)}
    assert found["eight clients, total tok/s over llama-server's"] == "FAIL"
    assert found["eight clients, median time to first token over llama-server's"] == "pass"
    assert found["largest gap of a decoding client beside a 1,000-token prompt, s"] == "pass"
    assert found["that prompt's time to first token, over being alone"] == "FAIL"
    assert list(found.values()).count("not measured") == len(found) - 4


def test_objectives_are_kept_apart(promises: ModuleType) -> None:
    """A cold prompt with the default objective keeps no promise of the other one."""
    published = promises.Published()
    published.take("decode", report("cold", {"ttft_s": 1.0}, {"ttft_s": 10.0}))
    verdicts = {words: verdict for words, _, _, verdict in promises.verdicts(published)}
    cold = next(words for words in verdicts if "cold prompt" in words)
    assert verdicts[cold] == "not measured"
    published.take("prefill", report("cold", {"ttft_s": 1.0}, {"ttft_s": 10.0}))
    assert {line[0]: line[3] for line in promises.verdicts(published)}[cold] == "pass"


def test_runs_of_single_workloads_are_put_together(promises: ModuleType, tmp_path: Path) -> None:
    """A later run replaces what it measured again, and keeps the rest, through the file."""
    path = tmp_path / "serving.json"
    first = promises.read(path)
    first.take("decode", report("cold", {"ttft_s": 1.0}, {"ttft_s": 2.0}))
    first.take("decode", report("single", {"decode_tok_s": 40.0}, {"decode_tok_s": 40.0}))
    promises.write(first, path)
    again = promises.read(path)
    again.take("decode", report("cold", {"ttft_s": 4.0}, {"ttft_s": 2.0}))
    assert again.reports["decode: cold"].ratio("cold", "brim", "ttft_s") == 2.0
    assert again.reports["decode: single"].median("single", "brim", "decode_tok_s") == 40.0
    assert not again.reports["decode: single"].samples[0].asked


def test_a_prefix_that_every_client_holds_counts_as_often(promises: ModuleType) -> None:
    """Cells that are saved are prefixes that are not there."""
    held = promises.Held(num_cells=3100, num_tokens=3100, num_prefix_tokens=700, num_clients=4)
    assert held.num_prefixes == 4.0


def test_the_table_stands_between_its_marks(promises: ModuleType, tmp_path: Path) -> None:
    """The rest of the page is left as it is, and a second writing changes nothing."""
    page = tmp_path / "page.md"
    page.write_text(f"before\n{promises.BEGIN}\nstale\n{promises.END}\nafter\n")
    published = promises.Published()
    published.take("decode", report("cold", {"ttft_s": 1.25}, {"ttft_s": 2.5}))
    promises.write_table(published, page)
    text = page.read_text()
    assert text.startswith(f"before\n{promises.BEGIN}\nMachine class: a machine.")
    assert text.endswith(f"{promises.END}\nafter\n")
    assert "| ttft_s | brim | 1.25 | 0.5 |" in text
    assert "stale" not in text
    promises.write_table(published, page)
    assert page.read_text() == text


def test_the_page_of_benchmarks_has_the_marks(promises: ModuleType) -> None:
    """What publishes has a place to write to."""
    text = (SCRIPT.parent.parent / "docs" / "benchmarks.md").read_text()
    assert 0 < text.index(promises.BEGIN) < text.index(promises.END)


def test_a_published_run_names_no_folders(promises: ModuleType) -> None:
    """Commands and models are told by their names: where they lay is nobody's measurement."""
    text = "env DIR=/tmp/x/y /usr/bin/python -m brim serve -m /m/a.gguf --port {port}"
    assert promises.without_folders(text) == (
        "env DIR=y python -m brim serve -m a.gguf --port {port}"
    )
