"""The one error hierarchy, sorted by who must act.

    BrimError                        status  who acts, and how
    ├── InvalidRequest               400     the client: change the request
    │   ├── ContextOverflow          400     the client: shorten the prompt or the answer
    │   ├── BodyTooLarge             413     the client: send less
    │   ├── RequestTimeout           408     the client: send the whole request, and sooner
    │   └── Unsupported              400     the client: leave it out, or pick another engine
    ├── Unauthenticated              401     the client: a key that this server knows
    ├── Unauthorized                 403     the client: a name that is served, or no force
    ├── NotFound                     404     the client: name something that exists
    ├── CapacityError                503     (base of the four below)
    │   ├── DoesNotFit               507     the operator: a smaller plan; waiting does not help
    │   ├── Busy                     503     the client: again after `retry_after_s`
    │   ├── RateLimited              429     the client: fewer at once, or later
    │   └── OverBudget               429     the client: when its app's budget renews
    ├── ModelFileError               422     the operator: another file; this one is damaged
    ├── ConfigError                  500     the operator: mend the setting that is named
    ├── EngineError                  500     us or the backend: the engine is named
    │   └── WorkerDied               503     the client: again; the worker is being restarted
    └── StoreError                   500     nobody: a store never fails a request, it is counted

Every class has an HTTP status and an OpenAI error type; a test walks the subclasses and compares
them with this drawing.  Errors cross the worker's socket as `ErrorInfo` (brim.core.answer).
"""

from typing import ClassVar


class BrimError(Exception):
    """Base of every error that brim raises on purpose; its message says what to do."""

    status: ClassVar[int] = 500
    openai_type: ClassVar[str] = "server_error"

    def __init__(
        self, message: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        """The request field or setting at fault, where there is one."""
        self.retry_after_s = retry_after_s
        """Seconds after which trying again makes sense, where waiting helps."""


class InvalidRequest(BrimError):
    """The client sent something that cannot be served as it stands."""

    status = 400
    openai_type = "invalid_request_error"


class ContextOverflow(InvalidRequest):
    """Prompt and answer bound are longer than the model's window."""


class BodyTooLarge(InvalidRequest):
    """The request body is over the server's limit."""

    status = 413


class RequestTimeout(InvalidRequest):
    """The request had not arrived as a whole when the server's patience ended."""

    status = 408


class Unsupported(InvalidRequest):
    """The request is valid, but this engine or version does not do it, and says so."""


class Unauthenticated(BrimError):
    """The server wants the key of an app, and the request has none that it knows."""

    status = 401
    openai_type = "authentication_error"


class Unauthorized(BrimError):
    """The request may not be served to this client."""

    status = 403
    openai_type = "permission_error"


class NotFound(BrimError):
    """A model, file or route that was named does not exist."""

    status = 404
    openai_type = "invalid_request_error"


class CapacityError(BrimError):
    """There is no room; the subclass says whether waiting helps."""

    status = 503


class DoesNotFit(CapacityError):
    """It never fits on this machine as asked; a smaller plan would."""

    status = 507


class Busy(CapacityError):
    """It does not fit now; `retry_after_s` says when to try again."""

    openai_type = "rate_limit_error"


class RateLimited(CapacityError):
    """The app has as many requests in work, or in this minute, as it may."""

    status = 429
    openai_type = "rate_limit_error"


class OverBudget(CapacityError):
    """The app has used up what it may in a day; `retry_after_s` says when that renews."""

    status = 429
    openai_type = "insufficient_quota"


class ModelFileError(BrimError):
    """A model file is missing parts, damaged, or of an unknown kind."""

    status = 422
    openai_type = "invalid_request_error"


class ConfigError(BrimError):
    """A setting, a port, a directory or a command line argument is wrong."""


class EngineError(BrimError):
    """The backend failed; the message names it."""


class WorkerDied(EngineError):
    """The model's process ended while it still owed answers."""

    status = 503


class StoreError(BrimError):
    """A cache on disk failed; requests go on without it."""


def all_error_classes() -> dict[str, type[BrimError]]:
    """Every class of the hierarchy by name, the root included."""
    found: dict[str, type[BrimError]] = {}
    queue: list[type[BrimError]] = [BrimError]
    while queue:
        cls = queue.pop()
        found[cls.__name__] = cls
        queue.extend(cls.__subclasses__())
    return found
