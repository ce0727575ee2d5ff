"""From a request to prompt tokens: the first phase of admission."""

from brim.chat.template import ChatTemplate
from brim.core.plan import Plan
from brim.core.request import Request
from brim.core.tokenizer import Tokenizer
from brim.errors import ContextOverflow, InvalidRequest

LIKELY_TOKEN_BYTES = 16
"""Longer than tokens are on average in any text; a prompt that fits the window by this measure is
tokenised without a further look."""


class PromptBuilder:
    """Renders and tokenises prompts for one loaded model; safe beside a stepping engine."""

    def __init__(self, plan: Plan, tokenizer: Tokenizer) -> None:
        self._context_tokens = plan.context_tokens
        self._tokenizer = tokenizer
        self._longest_token_bytes: int | None = None
        self._template = ChatTemplate(
            plan.model.chat_template, bos_piece=tokenizer.bos_piece, eos_piece=tokenizer.eos_piece
        )

    def tokens(self, request: Request) -> list[int]:
        """Prompt tokens of the request.

        Raises:
            InvalidRequest: The template is missing or refuses the messages, a token id is out of
                range, or nothing is left to feed.
            ContextOverflow: The text is far too long to be worth tokenising.
        """
        if request.messages is not None:
            text = self._template.render(request.messages, request.template_variables)
            tokens = self._encode(text, parse_special=True)
        elif request.prompt is not None:
            tokens = self._encode(request.prompt, parse_special=False)
        else:
            tokens = self._checked(request.prompt_tokens or ())
        if not tokens:
            raise InvalidRequest("the prompt has no tokens; send some text")
        return tokens

    def _encode(self, text: str, *, parse_special: bool) -> list[int]:
        """Tokens of a whole prompt, with one begin token where the model or the text has one.

        Most templates write the begin token and most tokenizers add it: two of them would put the
        model off its training.
        """
        self._check_length(text)
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

    def _check_length(self, text: str) -> None:
        """Refuse a text that cannot fit even if every token were the vocabulary's longest.

        Tokenising megabytes takes seconds, and the prompts of other clients wait for their turn.
        """
        num_bytes = len(text.encode("utf-8", "replace"))
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
