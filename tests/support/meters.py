"""A meter that keeps what it was told, and fails where a request is told twice or not at all."""

from collections import Counter

from brim.errors import OverBudget


class RecordingMeter:
    """Implements `runtime.metering.Meter`.

    Args:
        left_tokens: What each answer may have at most; None is no bound.
    """

    def __init__(self, left_tokens: int | None = None) -> None:
        self.left_tokens = left_tokens
        self.num_in_flight: Counter[str] = Counter()
        self.begun: dict[str, int] = {}
        """Request -> its bound, while it runs."""
        self.ended: dict[str, int] = {}
        """Request -> tokens that were drawn for it."""
        self.unread: set[str] = set()
        """Requests that ended before anything of their prompt was read."""
        self.num_prompt_tokens: Counter[str] = Counter()
        self.joules: dict[str, float] = {}
        self.written: Counter[str] = Counter()
        self.on_disk = True
        self.refusal: Exception | None = None

    @property
    def is_settled(self) -> bool:
        """Whether everything that came has gone."""
        return not self.begun and not self.num_in_flight.total()

    def enter(self, app: str) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.num_in_flight[app] += 1

    def leave(self, app: str) -> None:
        assert self.num_in_flight[app] > 0, "it left twice"
        self.num_in_flight[app] -= 1

    def answer_bound(
        self, app: str, *, num_prompt_tokens: int, num_choices: int, max_tokens: int
    ) -> int:
        if self.left_tokens is None:
            return max_tokens
        bound = min(max_tokens, (self.left_tokens - num_prompt_tokens) // num_choices)
        if bound < 1:
            raise OverBudget("nothing is left", retry_after_s=60.0)
        return bound

    def check_share(self, app: str, *, model: str, kv_tokens: int, pool_tokens: int) -> None:
        assert kv_tokens <= pool_tokens

    def check_kv_quality(self, app: str, *, model: str, kv_type_k: str, kv_type_v: str) -> None:
        return

    def begin(
        self,
        app: str,
        request_id: str,
        *,
        model: str,
        num_prompt_tokens: int,
        max_completion_tokens: int,
        kv_tokens: int,
    ) -> None:
        assert request_id not in self.begun, "it began twice"
        assert request_id not in self.ended, "it began after its end"
        self.begun[request_id] = max_completion_tokens
        self.num_prompt_tokens[app] += num_prompt_tokens

    def end(
        self,
        app: str,
        request_id: str,
        *,
        num_completion_tokens: int,
        num_cached_tokens: int = 0,
        num_prompt_tokens: int | None = None,
    ) -> None:
        if num_prompt_tokens == 0:
            self.unread.add(request_id)
        assert 0 <= num_cached_tokens <= self.num_prompt_tokens[app]
        bound = self.begun.pop(request_id)
        assert num_completion_tokens <= bound
        self.ended[request_id] = num_completion_tokens

    def keeps_on_disk(self, app: str) -> bool:
        return self.on_disk

    def note_written(self, app: str, num_bytes: int) -> None:
        self.written[app] += num_bytes

    def note_energy(self, app: str, joules: float) -> None:
        self.joules[app] = self.joules.get(app, 0.0) + joules
