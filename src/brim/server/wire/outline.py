"""A first look at a large body: what is too long is refused before it becomes objects.

Decoding holds Python's lock, and with it every other request: about 6 ms for a megabyte of token
ids on one core of a small x86 machine.  Skipping over values costs a tenth of that.
"""

from collections.abc import Sequence

import msgspec

from brim.errors import BrimError, InvalidRequest
from brim.runtime.api import ModelStatus
from brim.server import limits
from brim.server.wire.convert import check_length, find_model


class _Outline(msgspec.Struct):
    """The fields that can hold values by the million, and what their bounds depend on."""

    model: msgspec.Raw = msgspec.Raw(b"null")
    prompt: msgspec.Raw = msgspec.Raw(b"null")
    chat_template_kwargs: msgspec.Raw = msgspec.Raw(b"null")


_decoder = msgspec.json.Decoder(_Outline)


def refuse_oversized(body: bytes, models: Sequence[ModelStatus]) -> None:
    """Refuse lists and variables that are over their bounds; anything else wrong is left alone.

    Raises:
        ContextOverflow: `prompt` has more token ids than the model's window.
        InvalidRequest: `chat_template_kwargs` is too long.
    """
    try:
        outline = _decoder.decode(body)
        name = msgspec.json.decode(outline.model, type=str)
    except (ValueError, RecursionError):
        return  # decoding it says what is wrong
    num_bytes = len(bytes(outline.chat_template_kwargs))
    if num_bytes > limits.MAX_VARIABLES_BYTES:
        raise InvalidRequest(
            f"`chat_template_kwargs` has {num_bytes} bytes; the most is "
            f"{limits.MAX_VARIABLES_BYTES}",
            param="chat_template_kwargs",
        )
    try:
        context_tokens = find_model(name, models).plan.context_tokens
    except BrimError:
        return
    _check_prompt(bytes(outline.prompt), context_tokens)


def _check_prompt(prompt: bytes, context_tokens: int) -> None:
    inside = prompt[1:64].lstrip()
    if prompt[:1] != b"[" or inside[:1] == b'"':
        return  # text, and its commas are its own
    max_prompts = limits.MAX_PROMPTS if inside[:1] == b"[" else 1
    # Lists of ids hold no text, so every comma parts two ids or two lists.
    check_length(prompt.count(b",") + 1, max_prompts * context_tokens)
