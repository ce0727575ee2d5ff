"""The recorded requests."""

from importlib import resources
from pathlib import Path

import pytest

from brim.bench import workload
from brim.errors import ConfigError


def test_the_shipped_file_is_what_the_generator_makes() -> None:
    """Requests and the distributions that the module states cannot drift apart."""
    shipped = (resources.files("brim.bench") / "requests.jsonl").read_text("utf-8")
    assert shipped == workload.encode(workload.generate())


def test_every_request_is_within_the_stated_bounds() -> None:
    """Lengths respect the distributions' limits, and both endpoints get half of the requests."""
    requests = workload.load()
    bounds = workload.ANSWER_TOKENS
    assert all(bounds.low <= request.max_tokens <= bounds.high for request in requests)
    paths = [request.path for request in requests]
    assert paths.count("/completions") == paths.count("/chat/completions") == len(paths) // 2


def test_half_of_the_chats_share_two_system_prompts() -> None:
    """Prefix sharing between requests has something to find, also under a salt."""
    chats = [r.salted("salt") for r in workload.load() if r.messages is not None]
    systems = [
        r.messages[0].content for r in chats if r.messages and r.messages[0].role == "system"
    ]
    assert len(systems) == len(chats) // 2
    assert len(set(systems)) == 2
    assert all(text.startswith("salt\n") for text in systems)


def test_a_salt_changes_the_first_words_of_every_request() -> None:
    """Nothing before the salt could be found in a server's cache."""
    for request in workload.load():
        salted = request.salted("7")
        first = salted.prompt if salted.messages is None else salted.messages[0].content
        assert first is not None
        assert first.startswith("7\n")
        assert salted.max_tokens == request.max_tokens


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no requests"),
        ("nonsense\n", "line 1"),
        ('{"id": "a", "max_tokens": 1}\n', "either 'messages' or 'prompt'"),
        ('{"id": "a", "max_tokens": 1, "prompt": "x", "heat": 1}\n', "heat"),
    ],
)
def test_a_bad_file_is_refused_by_line(tmp_path: Path, text: str, complaint: str) -> None:
    """The message names the line and what is wrong with it."""
    path = tmp_path / "requests.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        workload.load(path)


def test_a_missing_file_is_a_setting_to_correct(tmp_path: Path) -> None:
    """A path that does not exist is reported as such, not as a traceback."""
    with pytest.raises(ConfigError, match="cannot read"):
        workload.load(tmp_path / "none.jsonl")


def test_the_limit_keeps_the_first_requests() -> None:
    """A shorter run uses the beginning of the same file."""
    assert workload.load(limit=3) == workload.load()[:3]
