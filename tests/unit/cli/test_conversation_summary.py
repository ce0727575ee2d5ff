"""The line that follows an answer."""

import pytest
from support.scripted import make_plan

from brim.cli.conversation import _summary
from brim.core.answer import FinishReason, Timings
from brim.core.cache import CacheReport, CacheSource


@pytest.mark.parametrize(
    ("num_prompt_tokens", "reason", "end"),
    [
        (10, FinishReason.STOP, "20 tokens at 9.5 tok/s"),
        (10, FinishReason.LENGTH, "tok/s; cut at its longest, see -n"),
        (8192 - 20, FinishReason.LENGTH, "tok/s; cut, for the context is full"),
    ],
)
def test_a_cut_answer_says_what_cut_it(
    num_prompt_tokens: int, reason: FinishReason, end: str
) -> None:
    """An answer that filled the window does not send the reader to -n."""
    timings = Timings(
        queue_s=0.0, prefill_s=0.5, decode_s=2.0, num_prompt_tokens=num_prompt_tokens,
        num_cached_tokens=0, num_completion_tokens=20,
    )  # fmt: skip
    line = _summary(make_plan(), timings, reason)
    assert line.startswith(f"small (llamacpp): {num_prompt_tokens} prompt tokens in 0.50 s, 20")
    assert line.endswith(end)


def test_what_was_not_read_again_is_said() -> None:
    """The reader sees why a long prompt took no time."""
    timings = Timings(
        queue_s=0.0, prefill_s=0.5, decode_s=2.0, num_prompt_tokens=10, num_cached_tokens=9,
        num_completion_tokens=20, cache=CacheReport(source=CacheSource.DISK, num_tokens=9),
    )  # fmt: skip
    line = _summary(make_plan(), timings, FinishReason.STOP)
    assert "10 prompt tokens (9 from disk) in 0.50 s" in line
