"""The recorded requests that every server gets: made once from stated distributions, then fixed.

`requests.jsonl` beside this module is what `generate` makes; a test compares them.  A line is an
OpenAI request body without `model` and `stream`: `messages` or `prompt`, and `max_tokens`.
"""

import math
import random
from importlib import resources
from pathlib import Path

import msgspec

from brim.errors import ConfigError

NUM_REQUESTS = 32
"""Enough for a 95th percentile over a few repetitions, few enough for minutes on two cores."""

SEED = 20_250_101

SHARED_SYSTEM_WORDS = 150
"""Length of each of the two system prompts that half of the chats share, as an app's do."""


class LogNormal(msgspec.Struct, frozen=True, kw_only=True):
    """A bounded log-normal distribution of lengths: many short, few long, as people write."""

    median: float
    sigma: float
    low: int
    high: int

    def draw(self, rng: random.Random) -> int:
        """One length."""
        length = round(rng.lognormvariate(math.log(self.median), self.sigma))
        return min(max(length, self.low), self.high)


PROMPT_WORDS = LogNormal(median=100, sigma=0.9, low=8, high=600)
"""The words of a request apart from a shared system prompt; the tail is cut so that a CPU can read
the whole file in about a minute with a model of 1 B parameters."""

ANSWER_TOKENS = LogNormal(median=64, sigma=0.7, low=16, high=256)
"""`max_tokens`; with `ignore_eos` every server produces exactly that many."""

CHAT_TURNS = (1, 1, 3, 5)
"""Messages of a chat without its system prompt; half of all chats are a first question."""

_WORDS = (
    "the a of to and in is for that it with as on by an be this from at or are was not which can "
    "list value file name number return function result string test order given every first last "
    "small large open close read write count word line table index key time path error user call "
    "model memory state answer question reason simple clear short long sum item data set find make"
).split()


class Turn(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One message of a recorded chat."""

    role: str
    content: str


class RecordedRequest(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """One request; exactly one of `messages` and `prompt` is given."""

    id: str
    max_tokens: int
    messages: tuple[Turn, ...] | None = None
    prompt: str | None = None

    @property
    def path(self) -> str:
        """Where it goes, below `/v1`."""
        return "/completions" if self.messages is None else "/chat/completions"

    def plain(self) -> "RecordedRequest":
        """The same request as a completion, for servers whose model has no chat template.

        Example:
            >>> chat = RecordedRequest(id="a", max_tokens=1, messages=(Turn("user", "Hi"),))
            >>> chat.plain().prompt.split()
            ['user:', 'Hi', 'assistant:']
        """
        if self.messages is None:
            return self
        turns = "".join(f"{turn.role}: {turn.content}\n\n" for turn in self.messages)
        return msgspec.structs.replace(self, messages=None, prompt=f"{turns}assistant:")

    def salted(self, salt: str) -> "RecordedRequest":
        """The same request with `salt` in front, so that no server answers it from memory.

        Requests that share a system prompt still share it under the same salt.
        """
        if self.messages is None:
            return msgspec.structs.replace(self, prompt=f"{salt}\n{self.prompt}")
        first, *rest = self.messages
        first = msgspec.structs.replace(first, content=f"{salt}\n{first.content}")
        return msgspec.structs.replace(self, messages=(first, *rest))


def load(path: Path | None = None, *, limit: int | None = None) -> list[RecordedRequest]:
    """Requests of a JSONL file, of the shipped one by default; at most the first `limit`.

    Raises:
        ConfigError: The file cannot be read, or a line is not a request; says which.
    """
    try:
        text = (path or resources.files(__package__) / "requests.jsonl").read_text("utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"cannot read the requests: {exc}") from exc
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            request = msgspec.json.decode(line, type=RecordedRequest)
        except msgspec.DecodeError as exc:
            raise ConfigError(f"line {number} of {path} is not a request: {exc}") from exc
        if bool(request.messages) == (request.prompt is not None):
            raise ConfigError(f"line {number} of {path} needs either 'messages' or 'prompt'")
        found.append(request)
    if not found:
        raise ConfigError(f"{path} holds no requests; give a file with one JSON object a line")
    return found[:limit]


def generate(seed: int = SEED) -> list[RecordedRequest]:
    """The shipped requests: chats and completions in turn."""
    rng = random.Random(seed)
    systems = [sentences(rng, SHARED_SYSTEM_WORDS) for _ in range(2)]
    return [
        _chat(rng, number, systems) if number % 2 == 0 else _completion(rng, number)
        for number in range(NUM_REQUESTS)
    ]


def encode(requests: list[RecordedRequest]) -> str:
    """The JSONL text of `requests`."""
    return "".join(msgspec.json.encode(request).decode() + "\n" for request in requests)


def _completion(rng: random.Random, number: int) -> RecordedRequest:
    words = PROMPT_WORDS.draw(rng)
    return RecordedRequest(
        id=f"completion-{number:02}",
        max_tokens=ANSWER_TOKENS.draw(rng),
        prompt=sentences(rng, words),
    )


def _chat(rng: random.Random, number: int, systems: list[str]) -> RecordedRequest:
    num_turns = rng.choice(CHAT_TURNS)
    words = PROMPT_WORDS.draw(rng)
    turns = [
        Turn(("user", "assistant")[place % 2], sentences(rng, max(4, words // num_turns)))
        for place in range(num_turns)
    ]
    if number % 4 == 0:
        turns.insert(0, Turn("system", systems[number // 4 % len(systems)]))
    return RecordedRequest(
        id=f"chat-{number:02}", max_tokens=ANSWER_TOKENS.draw(rng), messages=tuple(turns)
    )


def sentences(rng: random.Random, num_words: int) -> str:
    """Sentences of 6 to 14 words."""
    sentences = []
    while num_words > 0:
        length = min(num_words, rng.randint(6, 14))
        sentences.append(" ".join(rng.choices(_WORDS, k=length)).capitalize() + ".")
        num_words -= length
    return " ".join(sentences)
