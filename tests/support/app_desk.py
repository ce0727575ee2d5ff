"""A meter over real files, with a clock that stands still until it is told to go on."""

from pathlib import Path

from brim.apps.meter import Meter
from brim.apps.usage import UsageStore
from brim.core.app import App
from brim.core.event import Event

NOON_UNIX_S = 1_800_014_400.0
"""12:00 on 2027-01-15, UTC."""


class Desk:
    """One server's meter, its files, and what it told; starts again as often as it is asked to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.unix_s = NOON_UNIX_S
        self.monotonic_s = 0.0
        self.apps: dict[str, App] = {}
        self.events: list[Event] = []
        self._open()

    def start_again(self) -> None:
        """End the server in whatever it does, and start the next one."""
        self.store.flush()
        self.store.close()
        self._open()

    def after(self, seconds: float) -> None:
        """Let time pass."""
        self.unix_s += seconds
        self.monotonic_s += seconds

    def run(self, request_id: str, num_prompt: int, bound: int, *, app: str = "a") -> None:
        """Begin a request."""
        self.meter.begin(
            app,
            request_id,
            model="m",
            num_prompt_tokens=num_prompt,
            max_completion_tokens=bound,
            kv_tokens=num_prompt + bound,
        )

    def bound(self, num_prompt: int, wanted: int, *, num_choices: int = 1) -> int:
        """What the budget leaves of an answer."""
        return self.meter.answer_bound(
            "a", num_prompt_tokens=num_prompt, num_choices=num_choices, max_tokens=wanted
        )

    def _open(self) -> None:
        self.store = UsageStore(self.path, now=lambda: self.unix_s)
        self.meter = Meter(
            self.apps,
            self.store,
            on_event=self.events.append,
            clock=lambda: self.monotonic_s,
            now=lambda: self.unix_s,
        )
