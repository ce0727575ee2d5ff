"""Rows, complaints and plots of a comparison."""

import builtins
from pathlib import Path
from typing import Any

import msgspec
import pytest

from brim.bench.serving.checks import sample_complaints
from brim.bench.serving.plot import draw
from brim.bench.serving.report import Report, Sample, ServerNote, rows
from brim.bench.serving.session import Asked, Figure
from brim.bench.serving.sizes import Sizes
from brim.errors import ConfigError

NOTES = tuple(
    ServerNote(name=name, command=None, model="m", takes_ignore_eos=True) for name in ("a", "b")
)


def sample(server: str, repetition: int, value: float | None, **fields: Any) -> Sample:
    figures = () if value is None else (Figure(name="ttft_s", value=value),)
    return Sample(
        workload="cold",
        server=server,
        repetition=repetition,
        duration_s=1.0,
        figures=figures,
        **fields,
    )


def asked(**fields: Any) -> Asked:
    default = Asked(label="x", num_prompt_tokens=100, num_completion_tokens=16, is_same_text=True)
    return msgspec.structs.replace(default, **fields)


def test_ratios_are_taken_within_a_repetition() -> None:
    """A machine that slows down by half between repetitions leaves the ratio as it is."""
    samples = [sample("a", 0, 1.0), sample("b", 0, 3.0), sample("b", 1, 6.0), sample("a", 1, 2.0)]
    first, second = rows(samples, "a")
    assert (first.server, first.ratio) == ("a", None)
    assert second.ratio is not None
    assert (second.ratio.minimum, second.ratio.maximum) == (3.0, 3.0)


def test_the_reference_may_be_any_server() -> None:
    """Its row comes first, and the others' ratios are to it."""
    first, second = rows([sample("a", 0, 1.0), sample("b", 0, 4.0)], "b")
    assert (first.server, second.server) == ("b", "a")
    assert second.ratio is not None
    assert second.ratio.median == 0.25


def test_a_pair_that_lacks_one_side_gives_no_ratio() -> None:
    """The repetition in which the reference failed is left out, and its failure has a row."""
    samples = [sample("a", 0, None, failure="it died"), sample("b", 0, 3.0),
               sample("a", 1, 2.0), sample("b", 1, 4.0)]  # fmt: skip
    found = {(row.server, row.figure): row for row in rows(samples, "a")}
    ratio = found["b", "ttft_s"].ratio
    assert ratio is not None
    assert (ratio.num_samples, ratio.median) == (1, 2.0)
    assert found["a", ""].failure == "failed (1 of 2 times): it died"


def test_a_skipped_workload_is_not_called_a_failure() -> None:
    """What cannot be tried says so in its row."""
    (row,) = rows([sample("a", 0, None, failure="no crash", was_skipped=True)], "a")
    assert (row.value, row.failure) == (None, "skipped: no crash")


def test_figures_at_several_points_have_a_row_each() -> None:
    """Depths and rates are not mixed."""
    at = tuple(Figure(name="ttft_s", value=v, at=a) for v, a in ((1.0, "512"), (9.0, "4096")))
    samples = [msgspec.structs.replace(sample("a", 0, None), figures=at)]
    assert [(row.at, row.value.median) for row in rows(samples, "a") if row.value] == [
        ("512", 1.0),
        ("4096", 9.0),
    ]


def test_answers_of_unequal_length_are_a_complaint() -> None:
    """Who answers with fewer tokens did less."""
    samples = [
        sample("a", 0, 1.0, asked=(asked(),)),
        sample("b", 0, 1.0, asked=(asked(num_completion_tokens=9),)),
    ]
    (complaint,) = sample_complaints(samples, NOTES)
    assert "16 with 'a'" not in complaint
    assert "'x' had 16 answer tokens with 'a' and 9 with 'b'" in complaint


def test_prompts_of_unequal_length_are_a_complaint_where_the_text_is_the_same() -> None:
    """A server that drops a part of its prompt is found; one that quotes its own answer is not."""
    pairs = [
        (asked(), asked(num_prompt_tokens=70)),
        (asked(is_same_text=False), asked(is_same_text=False, num_prompt_tokens=70)),
        (asked(), asked(num_prompt_tokens=102)),
    ]
    found = [
        sample_complaints(
            [sample("a", 0, 1.0, asked=(one,)), sample("b", 0, 1.0, asked=(two,))], NOTES
        )
        for one, two in pairs
    ]
    assert [len(complaints) for complaints in found] == [1, 0, 0]
    assert "do not read the same text" in found[0][0]


def test_disturbed_turns_are_told() -> None:
    """The worst of them is named."""
    samples = [sample("a", 0, 1.0), sample("b", 0, 1.0, others_busy_fraction=0.4)]
    (complaint,) = sample_complaints(samples, NOTES)
    assert "during 1 of 2 turns, at most 40% of the processors (b, cold, repetition 1)" in complaint


def test_a_server_that_ends_where_it_likes_is_told() -> None:
    """Without ignore_eos its answers are of any length."""
    notes = [NOTES[0], msgspec.structs.replace(NOTES[1], takes_ignore_eos=False)]
    (complaint,) = sample_complaints([], notes)
    assert "'b' does not take ignore_eos" in complaint


def report(*samples: Sample) -> Report:
    return Report(
        machine="m",
        started_at="2026-01-01T00:00:00+00:00",
        seed=1,
        reference="a",
        servers=NOTES,
        sizes=Sizes(),
        repetitions=1,
        was_interrupted=False,
        complaints=(),
        samples=samples,
        rows=tuple(rows(samples, "a")),
    )


def test_a_report_gives_its_medians_and_ratios_by_name() -> None:
    """What is not there is None."""
    found = report(sample("a", 0, 2.0), sample("b", 0, 1.0))
    assert found.median("cold", "a", "ttft_s") == 2.0
    assert found.ratio("cold", "b", "ttft_s") == 0.5
    assert found.ratio("cold", "a", "ttft_s") is None
    assert found.median("cold", "c", "ttft_s") is None


def test_a_report_survives_json() -> None:
    """What is published can be read again, to the same rows."""
    found = report(sample("a", 0, 2.0, asked=(asked(),)), sample("b", 0, None, failure="no"))
    assert msgspec.json.decode(msgspec.json.encode(found), type=Report) == found


def test_nothing_to_plot_is_said(tmp_path: Path) -> None:
    """A run in which all failed draws no empty picture."""
    pytest.importorskip("matplotlib")
    with pytest.raises(ConfigError, match="nothing to plot"):
        draw(report(sample("a", 0, None, failure="no")), tmp_path / "x.svg")


def test_a_plot_without_its_library_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no dependency of brim, and the message says what to install."""
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match="install it beside brim"):
        draw(report(sample("a", 0, 1.0)), tmp_path / "x.svg")
