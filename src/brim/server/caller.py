"""Who sent a request, once that is known: what it may see, and whose prompts it reuses."""

import hashlib
import re
from collections.abc import Sequence

import msgspec
from starlette.types import Scope

from brim.core.app import App
from brim.runtime.api import ModelStatus

_SCOPE_NAME = "brim.caller"
"""Where the doorkeeper leaves the caller for routes; the prefix keeps others' names away."""

_KEY_DIGITS = 32
"""Of a key's SHA-256 in hex: 128 bits, of which nobody finds two alike."""


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """Who asks: an app, the operator, or nobody in particular."""

    app: App | None = None
    key: str = ""
    """That came with it and is no app's: OpenAI's clients always send some."""
    is_operator: bool = False
    """It has the server's own token."""

    @property
    def app_name(self) -> str:
        """The app's name; empty for everybody else."""
        return "" if self.app is None else self.app.name

    @property
    def namespace(self) -> str:
        """Whose prompts it reuses.  Keys themselves are never kept.

        Example:
            >>> Caller(app=App(name="mail")).namespace, Caller().namespace
            ('app:mail', '')
        """
        if self.app is not None:
            return f"app:{self.app.name}"
        if not self.key:
            return ""
        return f"key:{hashlib.sha256(self.key.encode()).hexdigest()[:_KEY_DIGITS]}"

    def may_use(self, model: str) -> bool:
        """Whether the model is there for it; one that was not granted is as if not served."""
        return self.app is None or self.app.may_use(model)

    def without_hidden(self, message: str, models: Sequence[ModelStatus]) -> str:
        """A message in which those of the served models that are not there for it have no name."""
        if all(self.may_use(status.name) for status in models):
            return message
        # Longest first, and its own as well: "chat" is not to be found in "chat-large".
        names = sorted((status.name for status in models), key=len, reverse=True)
        pattern = rf"(?<!\w)(?:{'|'.join(map(re.escape, names))})(?!\w)"
        return re.sub(
            pattern, lambda name: name[0] if self.may_use(name[0]) else "another model", message
        )

    def visible(self, models: Sequence[ModelStatus]) -> list[ModelStatus]:
        """Those of the served models that are there for it."""
        return [status for status in models if self.may_use(status.name)]


NOBODY = Caller()
"""Nobody in particular."""


def caller_of(scope: Scope) -> Caller | None:
    """Who sent the request; None where that was not asked and the request does not say."""
    found: Caller | None = scope.get(_SCOPE_NAME)
    return found


def known_caller(scope: Scope) -> Caller:
    """Who sent the request, on a route behind the doorkeeper."""
    caller = caller_of(scope)
    assert caller is not None, "the doorkeeper lets nobody in whom it does not know"
    return caller


def set_caller(scope: Scope, caller: Caller) -> None:
    """Leave word for `caller_of`."""
    scope[_SCOPE_NAME] = caller
