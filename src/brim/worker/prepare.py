"""From a request to prompt tokens: the first phase of admission."""

from collections.abc import Callable, Sequence
from datetime import datetime

import msgspec

from brim.chat.overflow import ToSummarize
from brim.chat.template import ChatTemplate
from brim.chat.token_edges import PieceCache, TokenEdges
from brim.chat.turns import Outline, common_length, outline
from brim.chat.volatile import Canonical, canonicalise
from brim.core.answer import MovedLine, OverflowReport
from brim.core.plan import Plan
from brim.core.request import Message, OverflowPolicy, Request
from brim.core.tokenizer import Tokenizer
from brim.errors import ContextOverflow, InvalidRequest
from brim.worker.overflow import Overflow, renumbered

LIKELY_TOKEN_BYTES = 16
"""Longer than tokens are on average in any text; a prompt that fits the window by this measure is
tokenised without a further look."""

MAX_OVERFLOW_BYTES = 8 * LIKELY_TOKEN_BYTES
"""Of text for each token of the window, in a conversation that a policy makes shorter: it is
tokenised with every request, and about thirty windows of English are enough."""

MAX_WINDOWS = 16
"""Whose cuts are remembered: the model's, those of apps, and what is left of each while power or
memory is short."""


class BuiltPrompt(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt, and what the scheduler needs to know of its shape."""

    tokens: list[int]
    turn_starts: tuple[int, ...] = ()
    """Token at which each message begins, rising from 0; empty where it cannot be told."""
    boundaries: tuple[int, ...] = ()
    """Numbers of tokens, rising: prompts that go on from the system prompt, or from a user's turn,
    begin with the same ones."""
    overflow: OverflowReport | None = None
    """What was done to make it fit."""
    shift_keep_tokens: int | None = None
    """With the policy `shift`: tokens at the beginning that stay when the answer outgrows the
    window."""
    to_summarize: ToSummarize | None = None
    """What must be summarised before there is a prompt that fits; the tokens are of all of it."""
    moved_lines: tuple[MovedLine, ...] = ()
    """Volatile lines that do not stand where the client put them."""


class PromptBuilder:
    """Renders and tokenises prompts for one loaded model; safe beside a stepping engine.

    Args:
        plan: Of the loaded model.
        tokenizer: Its own.
        can_shift: Whether its engine drops tokens while it answers.
        now: The clock that templates see, asked once for each prompt.
    """

    def __init__(
        self,
        plan: Plan,
        tokenizer: Tokenizer,
        *,
        can_shift: bool = False,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        self._context_tokens = plan.context_tokens
        self._tokenizer = tokenizer
        self._now = now
        self._pieces = PieceCache(tokenizer)
        self._longest_token_bytes: int | None = None
        self._can_shift = can_shift
        self._overflows: dict[int, Overflow] = {}
        self._template = ChatTemplate(
            plan.model.chat_template, bos_piece=tokenizer.bos_piece, eos_piece=tokenizer.eos_piece
        )

    def build(self, request: Request, summary: str | None = None) -> BuiltPrompt:
        """The prompt of the request, made shorter by its policy where it is too long.

        Args:
            request: The request.
            summary: Of what the last prompt made of it wanted summarised.

        Raises:
            InvalidRequest: The template is missing or refuses the messages, a token id is out of
                range, or nothing is left to feed.
            ContextOverflow: The text is far too long to be worth tokenising, or its policy cannot
                make it fit.
            Unsupported: The policy needs what the engine or the request does not have.
        """
        if request.messages is not None:
            return self._of_messages(request, request.messages, summary)
        whole = self._plain(request)
        return self._overflow(request).fit(request, whole, lambda messages: whole)

    def _plain(self, request: Request) -> BuiltPrompt:
        """A prompt without turns, as the client sent it."""
        if request.prompt is not None:
            is_bounded = request.overflow is OverflowPolicy.REJECT
            tokens = self._encode(request.prompt, parse_special=False, is_bounded=is_bounded)
        else:
            tokens = self._checked(request.prompt_tokens or ())
        _check_some(tokens)
        # Nobody knows where its turns end; what is sent again, or goes on, begins with all of it.
        return BuiltPrompt(tokens=tokens, boundaries=(len(tokens),))

    def _of_messages(
        self, request: Request, messages: Sequence[Message], summary: str | None
    ) -> BuiltPrompt:
        keeps = request.keep_volatile_lines
        canonical = Canonical.unchanged(messages) if keeps else canonicalise(messages)
        built = self._fitted(request, canonical, summary)
        overflow = built.overflow
        if overflow is not None and canonical.moved:
            overflow = renumbered(overflow, canonical.indices)
        return msgspec.structs.replace(built, moved_lines=canonical.moved, overflow=overflow)

    def _fitted(self, request: Request, canonical: Canonical, summary: str | None) -> BuiltPrompt:
        """The prompt of a conversation in the request's place, fitted by its policy."""

        def build(part: Sequence[Message]) -> BuiltPrompt:
            return self._conversation(request, part, canonical)

        whole = build(canonical.messages)
        if request.overflow is OverflowPolicy.REJECT:
            return whole
        rendered = msgspec.structs.replace(request, messages=canonical.messages)
        return self._overflow(request).fit(rendered, whole, build, summary)

    def _overflow(self, request: Request) -> Overflow:
        """The policies in the window that the request may use; each window remembers its cuts."""
        window = min(self._context_tokens, request.max_context_tokens or self._context_tokens)
        if window not in self._overflows:
            if len(self._overflows) >= MAX_WINDOWS:
                self._overflows.clear()
            self._overflows[window] = Overflow(
                window, can_shift=self._can_shift, count=self._num_tokens
            )
        return self._overflows[window]

    def _conversation(
        self, request: Request, messages: Sequence[Message], canonical: Canonical
    ) -> BuiltPrompt:
        """The prompt of messages of the conversation, under the request's variables."""
        now = self._now()

        def render(part: Sequence[Message], is_open: bool) -> str:
            return self._template.render(part, request.template_variables, is_open, now)

        found = outline(render, messages, canonical.later(messages))
        is_bounded = request.overflow is OverflowPolicy.REJECT
        tokens = self._encode(found.text, parse_special=True, is_bounded=is_bounded)
        _check_some(tokens)
        edges = TokenEdges(self._pieces, tokens, found.text)
        return BuiltPrompt(
            tokens=tokens,
            turn_starts=edges.turn_starts(found.starts),
            boundaries=self._boundaries(found, tokens, edges),
        )

    def _num_tokens(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special=False, parse_special=True))

    def _boundaries(self, found: Outline, tokens: list[int], edges: TokenEdges) -> tuple[int, ...]:
        boundaries = {self._system_boundary(found, tokens, edges)}
        for end, index in zip(found.ends, edges.settled(found.ends), strict=True):
            boundaries.add(self._turn_boundary(found, end, tokens) if index is None else index)
        return tuple(sorted(boundaries - {0}))

    def _system_boundary(self, found: Outline, tokens: list[int], edges: TokenEdges) -> int:
        """Tokens that prompts with this system prompt have in common; 0 where there is none."""
        if not found.system_end:
            return 0
        index = edges.settled_behind(found.system_end)
        return self._num_common(tokens, found.probes) if index is None else index

    def _turn_boundary(self, found: Outline, end: int, tokens: list[int]) -> int:
        """Tokens up to a turn's end that are the same whether or not anything follows.

        Where no control token parts the two, characters on both sides may share a token.
        """
        if end == len(found.text) and found.longer is not None:
            return self._num_common(tokens, [found.longer])
        return self._num_common(tokens, [found.text[:end]])

    def _num_common(self, tokens: list[int], others: Sequence[str]) -> int:
        """Tokens that a prompt begins with in common with other texts."""
        return min(
            common_length(tokens, self._encode(text, parse_special=True, is_bounded=False))
            for text in others
        )

    def _encode(self, text: str, *, parse_special: bool, is_bounded: bool = True) -> list[int]:
        """Tokens of a whole prompt, with one begin token where the model or the text has one.

        Most templates write the begin token and most tokenizers add it: two of them would put the
        model off its training.
        """
        self._check_length(text, is_bounded)
        encode, begin = self._tokenizer.encode, self._tokenizer.bos_piece
        if not begin or not text.startswith(begin):
            return encode(text, add_special=True, parse_special=parse_special)
        if parse_special:
            # In one piece: some tokenizers put a space before a text, but not behind a token.
            return encode(text, add_special=False, parse_special=True)
        rest = encode(text[len(begin) :], add_special=False, parse_special=parse_special)
        return encode(begin, add_special=False, parse_special=True) + rest

    def _checked(self, tokens: tuple[int, ...]) -> list[int]:
        vocab_size = self._tokenizer.vocab_size
        if tokens and not 0 <= min(tokens) <= max(tokens) < vocab_size:
            raise InvalidRequest(
                f"the prompt has a token id outside 0 to {vocab_size - 1}, this model's range",
                param="prompt",
            )
        return list(tokens)

    def _check_length(self, text: str, is_bounded: bool) -> None:
        """Refuse a text that cannot fit even if every token were the vocabulary's longest.

        Tokenising megabytes takes seconds, and the prompts of other clients wait for their turn.

        Args:
            text: What is to be tokenised.
            is_bounded: By the window; otherwise a policy makes it shorter.
        """
        num_bytes = len(text.encode("utf-8", "replace"))
        if not is_bounded:
            max_bytes = self._context_tokens * MAX_OVERFLOW_BYTES
            if num_bytes > max_bytes:
                raise ContextOverflow(
                    f"prompt is {num_bytes} bytes, more than the {max_bytes} that an overflow "
                    "policy is applied to with this context; leave out its oldest part"
                )
            return
        if num_bytes <= self._context_tokens * LIKELY_TOKEN_BYTES:
            return
        if self._longest_token_bytes is None:
            piece = self._tokenizer.piece
            self._longest_token_bytes = max(
                len(piece(token, special=True)) for token in range(self._tokenizer.vocab_size)
            )
        num_tokens = num_bytes // max(1, self._longest_token_bytes)
        if num_tokens > self._context_tokens:
            raise ContextOverflow(
                f"prompt is {num_bytes} bytes, at least {num_tokens} tokens, context is "
                f"{self._context_tokens}; shorten it or load with a larger --context"
            )


def _check_some(tokens: Sequence[int]) -> None:
    if not tokens:
        raise InvalidRequest("the prompt has no tokens; send some text")
