"""What the scheduler remembers of a request: the request, its choices, and prompts being read.

Plain mutable records with slots; loop.py and reuse.py alone change them.
"""

from collections import deque
from collections.abc import Sequence

import msgspec
import numpy as np

from brim.chat.stream import TextStream
from brim.core.answer import Timings
from brim.core.cache import CacheReport
from brim.core.request import Priority
from brim.core.sampling import SamplingParams
from brim.prefix_cache.format import Tokens
from brim.prefix_cache.store import Segment
from brim.scheduler.pool import Held


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
    keeps_on_disk: bool = True
    """False: nothing of it is written to disk, though what lies there may be read."""
    turn_starts: tuple[int, ...] = ()
    """Where each turn of the conversation begins in the prompt; empty where it has none."""
    boundaries: tuple[int, ...] = ()
    """Ends of prefixes that later prompts are likely to share, rising: of the system prompt, of
    each user's turn.  What is kept on disk ends there."""
    shift_keep_tokens: int | None = None
    """Where the answer may outgrow the window: tokens at the beginning that stay when it does."""


class Job:
    """A request from `add` to the end of its last choice."""

    __slots__ = (
        "admitted_s",
        "awaited",
        "blocked_at",
        "choices",
        "kv_tokens",
        "max_tokens",
        "num_likely_cached",
        "number",
        "prompt",
        "report",
        "request",
        "seed",
    )

    def __init__(
        self, request: ScheduledRequest, *, number: int, max_tokens: int, kv_tokens: int, seed: int
    ) -> None:
        self.request = request
        self.number = number
        """Counts up with every job; breaks ties first come, first served."""
        self.prompt: Tokens = np.array(request.prompt_tokens, np.int32)
        self.max_tokens = max_tokens
        self.kv_tokens = kv_tokens
        """Cells that it may come to need; promised from admission to the last choice's end."""
        self.seed = seed
        """Of choice 0; choice i uses seed + i."""
        self.num_likely_cached = 0
        """Prompt tokens that were there when it was last looked; the queue's order counts them."""
        self.awaited: tuple[Prefill, int] | None = None
        """Who reads a prefix of its prompt, and how long that is."""
        self.blocked_at = -1
        """The pool's version in which there was no room for it."""
        self.admitted_s: float | None = None
        """When its sequences were opened; None while it waits."""
        self.report = CacheReport()
        """What its prompt found."""
        self.choices: list[Choice] = []
        """Those that are open."""

    @property
    def namespace(self) -> str | None:
        """Whose its sequences become; None where nothing may be reused or kept."""
        return self.request.namespace if self.request.use_cache else None

    @property
    def usable(self) -> Tokens:
        """The part of the prompt that may be taken from elsewhere.

        The last token is always fed: only so is there a distribution to draw from.
        """
        return self.prompt[:-1]


class Choice:
    """One answer: an engine sequence, and the text that it becomes."""

    __slots__ = (
        "first_token_s",
        "held",
        "index",
        "is_open",
        "job",
        "num_cached_tokens",
        "num_shifted_tokens",
        "num_tokens",
        "num_unsent",
        "pending",
        "stream",
    )

    def __init__(self, job: Job, index: int, held: Held, stream: TextStream) -> None:
        self.job = job
        self.index = index
        self.held = held
        self.stream = stream
        self.is_open = True
        """Whether it still wants tokens."""
        self.pending = 0
        """The token that the next step feeds; meaningful while decoding."""
        self.num_tokens = 0
        """Tokens produced, the end token included."""
        self.num_unsent = 0
        """Tokens produced since the last delta: their text is held back."""
        self.num_cached_tokens = 0
        self.num_shifted_tokens = 0
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
            num_prompt_tokens=len(job.prompt),
            num_cached_tokens=self.num_cached_tokens,
            num_completion_tokens=self.num_tokens,
            seed=job.seed + self.index,
            cache=job.report,
            num_shifted_tokens=self.num_shifted_tokens,
        )


class Prefill:
    """A prompt on its way into one sequence, by restoring and by reading."""

    __slots__ = (
        "choice",
        "followers",
        "num_restorable",
        "num_target",
        "segments",
        "stops",
    )

    def __init__(self, choice: Choice, followers: list[Choice]) -> None:
        self.choice = choice
        self.followers = followers
        """Choices that will fork this sequence instead of reading the prompt themselves."""
        num_prompt_tokens = len(choice.job.prompt)
        self.num_target = num_prompt_tokens - 1 if followers else num_prompt_tokens
        """The last prompt token stays out where others fork: each choice must feed it itself, to
        draw its own first token.
        """
        self.segments: deque[Segment] = deque()
        """On disk, to be imported before anything is read."""
        self.num_restorable = 0
        """Length of the prefix once they are."""
        self.stops: list[int] = []
        """Lengths at which a step must end, because a state that cannot be cut is wanted there;
        rising."""

    @property
    def job(self) -> Job:
        """Whose prompt it is."""
        return self.choice.job

    @property
    def num_done(self) -> int:
        """Prompt tokens that are in the sequence."""
        return len(self.choice.held.tokens)

    @property
    def num_remaining(self) -> int:
        """Prompt tokens that are not."""
        return self.num_target - self.num_done

    def next_stop(self) -> int:
        """Where the next chunk ends at the latest."""
        return next((stop for stop in self.stops if stop > self.num_done), self.num_target)
