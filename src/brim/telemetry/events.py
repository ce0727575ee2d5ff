"""Notable events (a worker's death, a restart, a refusal) as one structured line on stderr each.

    2026-11-21T14:02:11Z worker_died model=demo pid=4242 code=-9

Key and value pairs as in logfmt, so that grep and a log collector can read them.  Not for what
happens once a request or a token.
"""

import json
import re
import sys
from datetime import UTC, datetime

_EVENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ [a-z_]+( [a-z_]+=|$)")


def log_event(name: str, **fields: object) -> None:
    """Write one event; never raises, since a closed stderr must not end a server.

    Args:
        name: What happened, in snake case.
        fields: What it happened to; None is left out.
    """
    when = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    pairs = [f"{key}={_value(value)}" for key, value in fields.items() if value is not None]
    _write(" ".join([when, name, *pairs]))


def relay_event(line: str) -> bool:
    """Write a line of another process's stderr to ours if it is an event; whether it is.

    Example:
        >>> relay_event("llama_model_load: error loading model")
        False
    """
    is_event = _EVENT.match(line) is not None
    if is_event:
        _write(line)
    return is_event


def _write(line: str) -> None:
    try:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        return


def _value(value: object) -> str:
    """The value as one word: quoted as JSON where it has spaces, quotes or control characters."""
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    plain = text and text.isprintable() and not set(text) & set(' "=')
    return text if plain else json.dumps(text, ensure_ascii=False)
