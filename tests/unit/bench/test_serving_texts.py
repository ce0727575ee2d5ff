"""Texts of the serving workloads, their sizes and their arrivals."""

import itertools

import pytest

from brim.bench.serving.mixed import arrivals_s
from brim.bench.serving.progress import Pace
from brim.bench.serving.sizes import Sizes
from brim.bench.serving.texts import Texts, Wording

WORDING = Wording(tokens_per_word=1.5, overhead_tokens=10.0)


def test_equal_seeds_give_equal_texts() -> None:
    """A run can be made again, and every server of a repetition reads the same words."""
    one, two = (Texts(7, 0, "cold", WORDING).text("prompt", 300) for _ in range(2))
    assert one == two


@pytest.mark.parametrize(
    "other",
    [
        Texts(8, 0, "cold", WORDING).text("prompt", 300),
        Texts(7, 1, "cold", WORDING).text("prompt", 300),
        Texts(7, 0, "depth", WORDING).text("prompt", 300),
        Texts(7, 0, "cold", WORDING).text("another", 300),
    ],
)
def test_texts_of_another_seed_repetition_workload_or_label_part_at_once(other: str) -> None:
    """What a server may keep of one is worth nothing for the other."""
    words = zip(
        Texts(7, 0, "cold", WORDING).text("prompt", 300).split(), other.split(), strict=False
    )
    assert sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], words)) < 5


def test_a_text_has_the_words_that_its_tokens_ask_for() -> None:
    """The template's own tokens are left out of what the words make up."""
    assert len(Texts(7, 0, "cold", WORDING).text("prompt", 310).split()) == 200


def test_a_longer_text_begins_as_the_shorter_one() -> None:
    """A context that grows keeps what it has."""
    texts = Texts(7, 0, "depth", WORDING)
    short, long = texts.text("the text", 100), texts.text("the text", 400)
    kept = len(short) - len(short.split()[-1]) - 1
    assert long.startswith(short[:kept])


def test_a_list_of_tools_is_about_as_long_as_asked() -> None:
    """Names and bullets count."""
    tools = Texts(7, 0, "agents", WORDING).tools("tools", 910)
    assert tools.count("\n- tool_") > 10
    assert 550 <= len(tools.split()) <= 680


def test_two_probes_give_the_tokens_of_a_word_and_of_the_template() -> None:
    """The line through them is used, and never one that goes down."""
    found = Wording.fitted((20, 50), (220, 350))
    assert (found.tokens_per_word, found.overhead_tokens) == (1.5, 20.0)
    assert Wording.fitted((20, 50), (220, 40)).tokens_per_word > 0


def test_sizes_scale_together() -> None:
    """Every length is multiplied, and none becomes nothing."""
    half = Sizes().scaled(0.5)
    assert (half.cold_prompt_tokens, half.depths[0]) == (700, 256)
    assert min(Sizes().scaled(0.001).depths) == 4


def test_arrivals_come_at_their_rate_and_are_always_the_same() -> None:
    """A thousand arrivals at 2 a second take about 500 s; gaps are as irregular as chance's."""
    times = arrivals_s(2.0, 1000)
    assert times == arrivals_s(2.0, 1000)
    assert 430 < times[-1] < 570
    gaps = [b - a for a, b in itertools.pairwise(times)]
    # Of an exponential distribution 63 % lie below its mean.
    assert 0.58 < sum(gap < 0.5 for gap in gaps) / len(gaps) < 0.68


def test_time_left_is_guessed_from_the_same_turn_then_from_the_workload() -> None:
    """A repetition costs what it cost before, another server what the first one cost."""
    pace = Pace([("cold", "a"), ("cold", "b"), ("single", "a"), ("cold", "a")])
    assert pace.left_in_words() == ""
    pace.took(10.0)
    assert pace.left_s() == 30.0
    pace.took(4.0)
    assert pace.left_s() == 7.0 + 10.0
    assert pace.left_in_words() == " (about 17 s left)"
