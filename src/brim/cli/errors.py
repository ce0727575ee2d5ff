"""What an exception means to the shell: one sentence on stderr and an exit code."""

import os
import sys
import traceback

from brim.errors import BrimError, DoesNotFit

DONE, FAILED, BAD_USAGE, DOES_NOT_FIT, INTERRUPTED = 0, 1, 2, 3, 130
"""Exit codes; 130 is 128 + SIGINT, as shells have it."""


def exit_code_of(error: BaseException) -> int:
    """The exit code for an exception that ended a command."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return DOES_NOT_FIT if isinstance(error, DoesNotFit) else FAILED


def report(error: BaseException) -> None:
    """Say in one sentence what went wrong; with BRIM_DEBUG=1, where as well."""
    if os.environ.get("BRIM_DEBUG"):
        traceback.print_exception(error, file=sys.stderr)
    say(sentence(error))


def sentence(error: BaseException) -> str:
    """The error on one line; one that brim did not raise on purpose says how to see more."""
    if isinstance(error, BrimError):
        return " ".join(error.message.split())
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}; BRIM_DEBUG=1 shows where it happened"
    what = " ".join(str(error).split()) or "no details"
    return f"unexpected {type(error).__name__}: {what}; BRIM_DEBUG=1 shows where it happened"


def say(text: str) -> None:
    """Write a line for the reader to stderr; a closed stderr is no error."""
    try:
        sys.stderr.write(f"brim: {text}\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        return
