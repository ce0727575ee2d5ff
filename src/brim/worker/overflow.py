"""What becomes of a prompt that outgrows the window, by the request's policy.

`fit` takes the prompt as the client sent it, and gives the one that is read, with a report of every
token that went.  Which turns go is brim.chat.overflow's arithmetic; writing a summary is the
gateway's, which asks for the prompt once more with it.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from brim.chat.overflow import (
    MIN_PIECE_TOKENS,
    START_PART,
    SUMMARY_HEADING,
    TARGET_PART,
    Conversation,
    ToSummarize,
    next_cut,
    replay_cuts,
    split_pieces,
    summary_instruction,
    text_of,
    with_summary,
)
from brim.core.answer import OverflowReport, RemovedTurn
from brim.core.request import Message, OverflowPolicy, Request
from brim.errors import BrimError, ContextOverflow
from brim.worker.overflow_shift import shifted

if TYPE_CHECKING:
    from brim.worker.prepare import BuiltPrompt

    Build = Callable[[Sequence[Message]], BuiltPrompt]
    """The prompt of some messages, as it would be without any policy."""

SUMMARY_PART = 1 / 16
"""Of the window: a summary's bound, 512 tokens at 8,192.  A tenth of what it stands for or less."""

MAX_SUMMARY_TOKENS = 1024
"""Longer ones are no summaries, and take long to write."""

TEXT_OVERHEAD_TOKENS = 8
"""Of a message beside its content, where a template does not let it be measured: most take 4 to 6
(two control words, the role, line ends)."""

MAX_KNOWN_COSTS = 32_768
"""Messages whose length in tokens is remembered, at about 150 bytes each."""


class Cut(NamedTuple):
    """A conversation without its oldest exchanges."""

    conversation: Conversation
    places: list[int]
    """Every message before which it was cut as it grew, rising; the last one holds."""
    fixed_tokens: int
    """Of every prompt: the system prompt and what the template writes around it."""
    whole: BuiltPrompt
    kept: BuiltPrompt
    """Of the system prompt and what comes after the last cut."""


class Overflow:
    """Applies the policies for one loaded model; used on one thread.

    Args:
        context_tokens: The window.
        can_shift: Whether the engine drops tokens while it answers.
        count: Tokens of a text by itself.
    """

    def __init__(
        self, context_tokens: int, *, can_shift: bool, count: Callable[[str], int]
    ) -> None:
        self._context_tokens = context_tokens
        self._can_shift = can_shift
        self._count = count
        self._known: OrderedDict[bytes, int] = OrderedDict()
        self._frame: tuple[int, int] | None = None

    @property
    def summary_tokens(self) -> int:
        """Bound of a summary."""
        return max(16, min(MAX_SUMMARY_TOKENS, int(self._context_tokens * SUMMARY_PART)))

    def fit(
        self, request: Request, whole: BuiltPrompt, build: Build, summary: str | None = None
    ) -> BuiltPrompt:
        """The prompt that is read.

        Args:
            request: Its policy, messages and `max_tokens`.
            whole: Its prompt, nothing left out.
            build: Makes the prompt of other messages in its place.
            summary: Of what is to be dropped, where the policy is to summarise and it was written.

        Returns:
            `whole` where that fits, or where the policy is to reject and whoever grants memory has
            the numbers; else a shorter prompt with its report, or `whole` with `to_summarize`.

        Raises:
            ContextOverflow: It cannot be made to fit by this policy.
            Unsupported: The policy needs something that the engine or the request does not have.
        """
        if request.overflow is OverflowPolicy.REJECT:
            return whole
        if request.overflow is OverflowPolicy.SHIFT:
            return shifted(request, whole, self._context_tokens, can_shift=self._can_shift)
        if request.messages is None:
            self._check_plain(request, whole)
            return whole
        return self._by_turns(request, request.messages, whole, build, summary)

    def _by_turns(
        self,
        request: Request,
        messages: Sequence[Message],
        whole: BuiltPrompt,
        build: Build,
        summary: str | None,
    ) -> BuiltPrompt:
        hard_limit = self._context_tokens - (request.max_tokens or 1)
        limit = min(int(self._context_tokens * START_PART), hard_limit)
        if len(whole.tokens) <= limit:
            return whole
        summarises = request.overflow is OverflowPolicy.SUMMARIZE
        reserve = self._note_tokens() if summarises else 0
        cut = self._cut(messages, whole, build, limit, reserve)
        self._check_newest(request, len(cut.kept.tokens), reserve if cut.places else 0)
        if not cut.places:
            return whole
        if not summarises:
            return msgspec.structs.replace(cut.kept, overflow=_report(request, cut))
        if summary is None:
            return msgspec.structs.replace(whole, to_summarize=self._work(cut))
        talk = cut.conversation
        system, turns = talk.messages[: talk.num_system], talk.messages[cut.places[-1] :]
        final = build(with_summary(system, turns, self._bounded(summary)))
        num_summary_tokens = len(final.tokens) - len(cut.kept.tokens)
        self._check_newest(request, len(cut.kept.tokens), num_summary_tokens)
        report = msgspec.structs.replace(
            _report(request, cut),
            num_tokens_after=len(final.tokens),
            num_summary_tokens=num_summary_tokens,
        )
        return msgspec.structs.replace(final, overflow=report)

    def _cut(
        self,
        messages: Sequence[Message],
        whole: BuiltPrompt,
        build: Build,
        limit: int,
        reserve: int,
    ) -> Cut:
        """Cut a prompt that is over the limit; nowhere where its newest exchange is all it has."""
        talk = self._conversation(messages, whole, build)
        fixed = sum(talk.costs[: talk.num_system])
        if not talk.num_system:
            fixed = self._measured_frame(build)[0]
        target = int(limit * TARGET_PART / START_PART)
        places = replay_cuts(
            talk, fixed_tokens=fixed + reserve, limit_tokens=limit, target_tokens=target
        )
        kept = build(talk.kept(places[-1])) if places else whole
        while len(kept.tokens) + reserve > limit:
            # Costs are estimates, and the first cut of all is decided by the exact length.
            last = places[-1] if places else talk.num_system
            later = next_cut(talk, last, len(kept.tokens) + reserve - target)
            if later is None:
                break
            places = [*places, later]
            kept = build(talk.kept(later))
        return Cut(talk, places, fixed, whole, kept)

    def _work(self, cut: Cut) -> ToSummarize:
        """What has to be summarised, in pieces that fit with the instruction and two summaries."""
        room = (
            self._context_tokens
            - cut.fixed_tokens
            - self._note_tokens()
            - self.summary_tokens
            - self._cost(summary_instruction(self.summary_tokens))
            - TEXT_OVERHEAD_TOKENS
        )
        if room < MIN_PIECE_TOKENS:
            raise ContextOverflow(
                f"the system prompt takes about {cut.fixed_tokens} tokens of the context of "
                f"{self._context_tokens} and leaves no room to summarize the rest; shorten it, or "
                'use the overflow policy "trim"',
                param="messages",
            )
        talk = cut.conversation
        return ToSummarize(
            system=talk.messages[: talk.num_system],
            pieces=split_pieces(talk, cut.places, room, self._cost),
            max_tokens=self.summary_tokens,
        )

    def _bounded(self, summary: str) -> str:
        """The summary within its bound: text may become more tokens than it was drawn as."""
        max_tokens = self.summary_tokens + TEXT_OVERHEAD_TOKENS
        while summary and (num_tokens := self._cost(summary)) > max_tokens:
            summary = summary[: min(len(summary) - 1, len(summary) * max_tokens // num_tokens)]
        return summary

    def _note_tokens(self) -> int:
        """What a summary adds to a prompt at most."""
        return self.summary_tokens + self._cost(f"\n\n{SUMMARY_HEADING}\n") + TEXT_OVERHEAD_TOKENS

    def _check_newest(
        self, request: Request, num_kept_tokens: int, num_summary_tokens: int
    ) -> None:
        """Refuse what is over the window though nothing more can go."""
        max_tokens = request.max_tokens or 1
        num_tokens = num_kept_tokens + num_summary_tokens
        over = num_tokens + max_tokens - self._context_tokens
        if over <= 0:
            return
        asked = "" if request.max_tokens is None else f" and max_tokens {max_tokens}"
        summary = ", with a summary," if num_summary_tokens else ""
        ways = [f"shorten them by {over}"] if over < num_tokens else []
        if over < max_tokens:
            ways.append(f"ask for at most {max_tokens - over} max_tokens")
        elif not ways:
            ways.append("shorten them and ask for fewer max_tokens")
        raise ContextOverflow(
            f"the system prompt and the newest turn alone{summary} are {num_tokens} tokens{asked}, "
            f"context is {self._context_tokens}; {', '.join(ways)} or load with a larger --context",
            param="messages",
        )

    def _check_plain(self, request: Request, whole: BuiltPrompt) -> None:
        """Refuse to cut turns from a prompt that has none."""
        over = len(whole.tokens) + (request.max_tokens or 1) - self._context_tokens
        if over <= 0:
            return
        raise ContextOverflow(
            f"prompt is {len(whole.tokens)} tokens, {over} more than the context of "
            f'{self._context_tokens} has room for, and the overflow policy "{request.overflow}" '
            'drops turns, which a plain prompt has none of; shorten it, use the policy "shift", '
            "or send messages",
            param="prompt",
        )

    # --- costs -----------------------------------------------------------------------------------

    def _conversation(
        self, messages: Sequence[Message], whole: BuiltPrompt, build: Build
    ) -> Conversation:
        """The messages with their costs: exact where it is known where each begins."""
        frame_tokens, overhead = self._measured_frame(build)
        if len(whole.turn_starts) == len(messages):
            starts = [*whole.turn_starts, len(whole.tokens)]
            costs = [end - start for start, end in itertools.pairwise(starts)]
        else:
            costs = [self._cost(text_of(message)) + overhead for message in messages]
            costs[0] += frame_tokens
        conversation = Conversation(tuple(messages), tuple(costs))
        if not conversation.num_system:
            # What every prompt has stays when its first message goes.
            costs[0] = max(0, costs[0] - frame_tokens)
        return conversation._replace(costs=tuple(costs))

    def _cost(self, text: str) -> int:
        """Tokens of a text; history comes again with every request, and is counted once."""
        key = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()
        cost = self._known.get(key)
        if cost is None:
            cost = self._known[key] = self._count(text)
            if len(self._known) > MAX_KNOWN_COSTS:
                self._known.popitem(last=False)
        else:
            self._known.move_to_end(key)
        return cost

    def _measured_frame(self, build: Build) -> tuple[int, int]:
        """Tokens that every prompt has, and that every message has beside its content."""
        if self._frame is None:
            question = Message(role="user", content="a")
            answer = Message(role="assistant", content="b")
            try:
                one = len(build((question,)).tokens)
                three = len(build((question, answer, question)).tokens)
            except BrimError:
                self._frame = TEXT_OVERHEAD_TOKENS, TEXT_OVERHEAD_TOKENS
            else:
                contents = self._cost("a") + self._cost("b")
                overhead = max(0, -(-(three - one - contents) // 2))
                self._frame = max(0, one - self._cost("a") - overhead), overhead
        return self._frame


def _report(request: Request, cut: Cut) -> OverflowReport:
    num_removed = len(cut.whole.tokens) - len(cut.kept.tokens)
    return OverflowReport(
        policy=request.overflow,
        num_tokens_before=len(cut.whole.tokens),
        num_tokens_after=len(cut.kept.tokens),
        num_removed_tokens=num_removed,
        removed_turns=_removed_turns(cut.conversation, cut.places[-1], num_removed),
    )


def renumbered(report: OverflowReport, indices: Sequence[int]) -> OverflowReport:
    """The report with other numbers for its turns.

    Args:
        report: Its turns are numbered as the messages that were cut.
        indices: For each of those, its place among those that the client sent.
    """
    turns = tuple(
        msgspec.structs.replace(turn, index=indices[turn.index]) for turn in report.removed_turns
    )
    return msgspec.structs.replace(report, removed_turns=turns)


def _removed_turns(
    conversation: Conversation, cut: int, num_tokens: int
) -> tuple[RemovedTurn, ...]:
    """The messages between the system prompt and the cut, with what went with each.

    The parts add up to the whole to the token: what costs are off, the oldest turns take.
    """
    indexes = range(conversation.num_system, cut)
    off = num_tokens - sum(conversation.costs[index] for index in indexes)
    turns = []
    for index in indexes:
        cost = conversation.costs[index]
        taken = max(0, cost + off)
        off -= taken - cost
        role = conversation.messages[index].role
        turns.append(RemovedTurn(index=index, role=role, num_tokens=taken))
    return tuple(turns)
