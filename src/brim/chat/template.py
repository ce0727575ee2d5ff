"""Chat templates: a conversation becomes the text that the model was trained to continue.

Owns rendering and the sentence a client reads when it fails; tokens are the tokenizer's business.
The dialect is Hugging Face's: `messages`, `add_generation_prompt`, `bos_token`, `eos_token`,
`tools` and `documents` (none), `raise_exception`, `strftime_now`, `tojson`, loop controls.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateSyntaxError

from brim.chat.history import AS_TEXT, ChosenForm, choose_form, plain
from brim.chat.meter import MAX_SIZE, METER, Meter
from brim.chat.sandbox import MeteredEnvironment, Refusal
from brim.core.request import Message
from brim.errors import InvalidRequest

MAX_SOURCE_CHARS = 256 * 1024
"""The longest templates in use are about 20,000 characters; compiling is quadratic at worst."""

MAX_RENDER_S = 10.0
"""A hundred times what a full context window takes; after it the template counts as endless."""

MAX_REASON_CHARS = 300
"""Of a template's own words quoted in an error."""

_RESERVED = frozenset({"messages", "add_generation_prompt", "bos_token", "eos_token", "tools"})

_WAY_OUT = "send the prompt as text to /v1/completions, or run with --raw"


class ChatTemplate:
    """One model's template, compiled once; `render` may be called from several threads.

    A template that does not compile is an error of each `render`, not of construction: the model
    behind it still completes plain prompts.

    Args:
        source: The jinja2 source, or None for a model without one.
        bos_piece: Text of the begin token, `bos_token` to the template.
        eos_piece: Text of the end token, `eos_token` to the template.
        now: The clock behind `strftime_now`.
        max_render_s: Seconds after which a rendering is given up.
    """

    def __init__(
        self,
        source: str | None,
        *,
        bos_piece: str,
        eos_piece: str,
        now: Callable[[], datetime] = datetime.now,
        max_render_s: float = MAX_RENDER_S,
    ) -> None:
        self._special = {"bos_token": bos_piece, "eos_token": eos_piece}
        self._max_render_s = max_render_s
        self._template: Template | None = None
        self._now = now
        self._call_form: ChosenForm | None = None
        self._why_not = ""
        if source is None or not source.strip():
            self._why_not = f"this model has no chat template; {_WAY_OUT}"
        elif len(source) > MAX_SOURCE_CHARS:
            self._why_not = (
                f"this model's chat template has {len(source)} characters, more than the "
                f"{MAX_SOURCE_CHARS} that are compiled; {_WAY_OUT}"
            )
        else:
            self._compile(source)

    def _compile(self, source: str) -> None:
        try:
            self._template = MeteredEnvironment(self._now).compile_metered(source)
        except TemplateSyntaxError as exc:
            reason = f"line {exc.lineno}: {exc.message}"
            self._why_not = f"this model's chat template does not compile ({_quote(reason)})"
        except Exception as exc:  # a parser bug or RecursionError is as final as a syntax error
            self._why_not = f"this model's chat template does not compile ({_describe(exc)})"
        if self._template is None:
            self._why_not += f"; {_WAY_OUT}"

    def render(
        self,
        messages: Sequence[Message],
        variables: Mapping[str, Any],
        add_generation_prompt: bool = True,
        now: datetime | None = None,
    ) -> str:
        """The prompt text of a conversation.

        Args:
            messages: Oldest first.
            variables: The request's own, as `enable_thinking`; plain JSON values.
            add_generation_prompt: End with the words that open the model's turn.
            now: What `strftime_now` tells; by default the clock is asked.

        Raises:
            InvalidRequest: There is no usable template, a variable has a reserved name, or the
                template refused or failed; the message says which.
        """
        if self._template is None:
            raise InvalidRequest(self._why_not, param="messages")
        _check_names(variables)
        form = self._form(self._template) if any(m.tool_calls for m in messages) else AS_TEXT
        context = self._context([plain(message, form) for message in messages])
        context = {"tools": None, "documents": None, **variables, **context}
        context["add_generation_prompt"] = add_generation_prompt
        if now is not None:
            context["strftime_now"] = now.strftime
        try:
            return _gather(self._template, context)
        except Refusal as exc:
            raise InvalidRequest(
                f"this model's chat template refuses the messages: {_quote(str(exc))}",
                param="messages",
            ) from exc
        except InvalidRequest:
            raise
        except Exception as exc:  # template code can raise anything, MemoryError included
            raise InvalidRequest(
                f"this model's chat template failed ({_describe(exc)}); {_WAY_OUT}",
                param="messages",
            ) from exc

    def _context(self, messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {**self._special, "messages": messages, METER: Meter(self._max_render_s)}

    def _form(self, template: Template) -> ChosenForm:
        """How this template wants tool calls, tried out when the first one comes."""
        if self._call_form is None:
            self._call_form = choose_form(lambda messages: self._tried(template, messages))
        return self._call_form

    def _tried(self, template: Template, messages: Sequence[Mapping[str, Any]]) -> str | None:
        try:
            return _gather(template, {"tools": None, "documents": None, **self._context(messages)})
        except Exception:  # as in render, and a form that fails is not the template's
            return None


def _gather(template: Template, context: dict[str, Any]) -> str:
    parts: list[str] = []
    size = 0
    for part in template.generate(context):
        parts.append(part)
        size += len(part)
        if size > MAX_SIZE:
            raise InvalidRequest(
                f"this model's chat template makes more than {MAX_SIZE} characters of the "
                f"messages; send fewer or shorter ones",
                param="messages",
            )
    return "".join(parts)


def _check_names(variables: Mapping[str, Any]) -> None:
    for name in variables:
        if name in _RESERVED or not name.isidentifier() or name.startswith("_"):
            raise InvalidRequest(
                f"{_quote(repr(name))} cannot be set as a template variable; leave it out of "
                f"chat_template_kwargs",
                param="chat_template_kwargs",
            )


def _describe(exc: Exception) -> str:
    return _quote(f"{type(exc).__name__}: {exc}" if str(exc) else type(exc).__name__)


def _quote(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MAX_REASON_CHARS else line[:MAX_REASON_CHARS] + "..."
