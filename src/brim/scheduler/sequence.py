"""What the scheduler remembers of a request: the request, its choices, and prompts being read.

Plain mutable records with slots; loop.py alone changes them.
"""

from collections.abc import Sequence

import msgspec

from brim.chat.stream import TextStream
from brim.core.answer import Timings
from brim.core.request import Priority
from brim.core.sampling import SamplingParams


class ScheduledRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One request as the scheduler takes it: tokens, bounds and how to sample."""

    ticket: int
    """The caller's number for it; deltas come back under it."""
    prompt_tokens: Sequence[int]
    max_tokens: int
    """Most tokens of each choice."""
    num_choices: int = 1
    stop: tuple[str, ...] = ()
    sampling: SamplingParams = SamplingParams()
    arrived_s: float = 0.0
    """When it arrived, by the scheduler's clock; queue time counts from here."""
    priority: Priority = Priority.INTERACTIVE
    namespace: str = ""
    """Whose KV it may reuse."""
    use_cache: bool = True
    """False: reuse nothing, keep nothing."""
    turn_starts: tuple[int, ...] = ()
    """Where each turn of the conversation begins in the prompt; empty where it has none."""
    boundaries: tuple[int, ...] = ()
    """Ends of prefixes that later prompts are likely to share, rising: of the system prompt, of
    each user's turn.  What is kept on disk ends there."""
    shift_keep_tokens: int | None = None
    """Where the answer may outgrow the window: tokens at the beginning that stay when it does."""


class Job:
    """A request from `add` to the end of its last choice."""

    __slots__ = ("admitted_s", "choices", "kv_tokens", "max_tokens", "number", "request", "seed")

    def __init__(
        self, request: ScheduledRequest, *, number: int, max_tokens: int, kv_tokens: int, seed: int
    ) -> None:
        self.request = request
        self.number = number
        """Counts up with every job; breaks ties first come, first served."""
        self.max_tokens = max_tokens
        self.kv_tokens = kv_tokens
        """Cells that it may come to need; held from admission to the last choice's end."""
        self.seed = seed
        """Of choice 0; choice i uses seed + i."""
        self.admitted_s: float | None = None
        """When its sequences were opened; None while it waits."""
        self.choices: list[Choice] = []
        """Those that are open."""


class Choice:
    """One answer: an engine sequence, and the text that it becomes."""

    __slots__ = (
        "first_token_s",
        "index",
        "is_open",
        "job",
        "num_cached_tokens",
        "num_tokens",
        "num_unsent",
        "pending",
        "seq_id",
        "stream",
    )

    def __init__(self, job: Job, index: int, seq_id: int, stream: TextStream) -> None:
        self.job = job
        self.index = index
        self.seq_id = seq_id
        self.stream = stream
        self.is_open = True
        """Whether `seq_id` is still this choice's; the engine gives ids out again."""
        self.pending = 0
        """The token that the next step feeds; meaningful while decoding."""
        self.num_tokens = 0
        """Tokens produced, the end token included."""
        self.num_unsent = 0
        """Tokens produced since the last delta: their text is held back."""
        self.num_cached_tokens = 0
        self.first_token_s: float | None = None

    def timings(self, now_s: float) -> Timings:
        """Where the time went, for a choice that ends at `now_s`."""
        job = self.job
        admitted_s = now_s if job.admitted_s is None else job.admitted_s
        first_token_s = now_s if self.first_token_s is None else self.first_token_s
        return Timings(
            queue_s=admitted_s - job.request.arrived_s,
            prefill_s=first_token_s - admitted_s,
            decode_s=now_s - first_token_s,
            num_prompt_tokens=len(job.request.prompt_tokens),
            num_cached_tokens=self.num_cached_tokens,
            num_completion_tokens=self.num_tokens,
            seed=job.seed + self.index,
        )


class Prefill:
    """A prompt on its way into one sequence."""

    __slots__ = ("age", "choice", "followers", "num_done", "num_target")

    def __init__(self, choice: Choice, followers: list[Choice]) -> None:
        self.choice = choice
        self.followers = followers
        """Choices that will fork this sequence instead of reading the prompt themselves."""
        self.num_done = 0
        num_prompt_tokens = len(choice.job.request.prompt_tokens)
        self.num_target = num_prompt_tokens - 1 if followers else num_prompt_tokens
        """The last prompt token stays out where others fork: each choice must feed it itself, to
        draw its own first token.
        """
        self.age = 0
        """Steps in which others were read instead."""

    @property
    def num_remaining(self) -> int:
        """Prompt tokens that have not been read."""
        return self.num_target - self.num_done
