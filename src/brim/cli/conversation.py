"""One model in a worker of its own, and the turns that a person has with it."""

import asyncio
import contextlib
import io
import itertools
import sys
from collections.abc import Iterable

from brim.cli.errors import say, sentence
from brim.cli.neighbours import forecast_history, grant_book
from brim.cli.planning import room_note
from brim.config.tree import Settings
from brim.core.answer import Delta, FinishReason, Timings
from brim.core.plan import Plan
from brim.core.request import Message, Request
from brim.core.sampling import SamplingParams
from brim.errors import BrimError, ContextOverflow
from brim.ledger.account import Account
from brim.machine.reading import read_machine
from brim.runtime.gateway import Gateway

HELP = "/clear forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer"

HOW_TO_GO_ON = "/clear starts anew"
"""What helps in a conversation that has filled the window."""


class Conversation:
    """Asks one planned model; text goes to stdout as it is made.

    Args:
        plan: How the model is loaded.
        settings: The settings.
        max_tokens: Bound of each answer; by the settings where None.
        sampling: How tokens are chosen.
        raw: Complete the text itself instead of answering it as a turn.
    """

    def __init__(
        self,
        plan: Plan,
        settings: Settings,
        *,
        max_tokens: int | None,
        sampling: SamplingParams,
        raw: bool,
    ) -> None:
        self._plan = plan
        self._settings = settings
        self._max_tokens = max_tokens
        self._sampling = sampling
        self._raw = raw
        self._history: list[Message] = []
        self._numbers = itertools.count(1)
        self._gateway: Gateway | None = None

    async def open(self, *, force: bool) -> None:
        """Load the model.

        Raises:
            DoesNotFit: There is no room for it; `force` loads it all the same.
            BrimError: It cannot be loaded.
        """
        self._gateway = Gateway(
            [self._plan],
            settings=self._settings,
            account=Account(),
            read_machine=read_machine,
            book=grant_book(),
            history=forecast_history(),
            force=force,
        )
        await self._gateway.start()
        for name, grant in self._gateway.grants().items():
            if note := room_note(grant):
                say(f"{name}: {note}")

    async def close(self) -> None:
        """Unload the model."""
        if self._gateway is not None:
            await self._gateway.stop()

    async def answer(self, text: str) -> None:
        """Print the answer to `text`, which joins the history with it if there was one.

        Raises:
            BrimError: The answer could not be given, or broke off; the history is as before.
        """
        assert self._gateway is not None
        asked = Message(role="user", content=text)
        pieces: list[str] = []
        ended: Delta | None = None
        answer = await self._gateway.submit(self._request(asked))
        if answer.overflow is not None:
            num_tokens, policy = answer.overflow.num_removed_tokens, answer.overflow.policy.value
            say(f"{num_tokens} tokens of earlier turns were left out ({policy})")
        try:
            async for deltas in answer:
                pieces += _print_text(deltas)
                ended = deltas[-1]
        except asyncio.CancelledError:
            # An answer that was stopped is still what was said.
            self._remember(asked, pieces)
            raise
        finally:
            if pieces and not pieces[-1].endswith("\n"):
                with contextlib.suppress(OSError):
                    sys.stdout.write("\n")
                    sys.stdout.flush()
        if ended is not None and ended.error is not None:
            raise ended.error.exception()
        self._remember(asked, pieces)
        if ended is not None and ended.timings is not None:
            say(_summary(self._plan, ended.timings, ended.finish_reason))

    def _remember(self, asked: Message, pieces: list[str]) -> None:
        """Keep a turn; a question without an answer would only confuse the model."""
        if said := "".join(pieces):
            self._history += [asked, Message(role="assistant", content=said)]

    def converse(self, runner: asyncio.Runner) -> None:
        """Read turns from the terminal and answer them until the reader leaves."""
        if isinstance(sys.stdin, io.TextIOWrapper):
            # A stray byte must not end the conversation; in some locales it is an error, in others
            # a lone surrogate, which no worker takes.
            sys.stdin.reconfigure(errors="replace")
        note = f"{self._plan.model.name} is ready; {HELP}"
        while True:
            try:
                if note:
                    say(note)
                    note = ""
                text = _read_line()
                if text == "/exit":
                    return
                if text == "/clear":
                    self._history.clear()
                elif text:
                    self._turn(runner, text)
            except EOFError:
                sys.stderr.write("\n")
                return
            except KeyboardInterrupt:
                # Perhaps meant for an answer that had just ended: keep what was said.
                note = f"nothing to stop; {HELP}"

    def _turn(self, runner: asyncio.Runner, text: str) -> None:
        """One turn; what goes wrong with it ends the turn, not the conversation."""
        try:
            runner.run(self.answer(text))
        except KeyboardInterrupt:
            say("stopped")
        except ContextOverflow as error:
            say(f"{sentence(error)}; {HOW_TO_GO_ON}" if self._history else sentence(error))
        except BrimError as error:
            say(sentence(error))

    def _request(self, asked: Message) -> Request:
        return Request(
            request_id=f"run-{next(self._numbers)}",
            model=self._plan.model.name,
            messages=None if self._raw else (*self._history, asked),
            prompt=asked.content if self._raw else None,
            max_tokens=self._max_tokens,
            sampling=self._sampling,
            overflow=self._settings.models.overflow,
        )


def _print_text(deltas: Iterable[Delta]) -> list[str]:
    """Write what has arrived at once, so that it can be read as it is made."""
    pieces = [delta.text for delta in deltas if delta.text]
    sys.stdout.write("".join(pieces))
    sys.stdout.flush()
    return pieces


def _read_line() -> str:
    """The next line of the reader; the prompt goes to stderr where stdout is not a terminal."""
    if sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (importing it gives input() its line editing)
        return input("> ").strip()
    sys.stderr.write("> ")
    sys.stderr.flush()
    return input().strip()


def _summary(plan: Plan, timings: Timings, reason: FinishReason | None) -> str:
    """How the answer went, in one line."""
    num_tokens, decode_s = timings.num_completion_tokens, timings.decode_s
    # The first token comes out of the prefill; decode time is for those after it.
    speed = f" at {(num_tokens - 1) / decode_s:.1f} tok/s" if num_tokens > 1 and decode_s else ""
    cut = ""
    if reason is FinishReason.LENGTH:
        is_full = timings.num_prompt_tokens + num_tokens >= plan.context_tokens
        cut = "; cut, for the context is full" if is_full else "; cut at its longest, see -n"
    reused = ""
    if timings.cache.num_tokens:
        reused = f" ({timings.cache.num_tokens} from {timings.cache.source.value})"
    return (
        f"{plan.model.name} ({plan.engine}): {timings.num_prompt_tokens} prompt tokens{reused} in "
        f"{timings.prefill_s:.2f} s, {num_tokens} tokens{speed}{cut}"
    )
