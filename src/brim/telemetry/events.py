"""Notable events (a worker's death, a restart, a refusal) as one structured line on stderr each.

    2026-11-21T14:02:11Z worker_died model=demo pid=4242 code=-9

Key and value pairs as in logfmt, so that grep and a log collector can read them.  Not for what
happens once a request or a token.
"""

import json
import sys
from datetime import UTC, datetime


def log_event(name: str, **fields: object) -> None:
    """Write one event; never raises, since a closed stderr must not end a server.

    Args:
        name: What happened, in snake case.
        fields: What it happened to; None is left out.
    """
    when = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    pairs = [f"{key}={_value(value)}" for key, value in fields.items() if value is not None]
    try:
        sys.stderr.write(" ".join([when, name, *pairs]) + "\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        return


def _value(value: object) -> str:
    """The value as one word: quoted as JSON where it has spaces, quotes or control characters."""
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    plain = text and text.isprintable() and not set(text) & set(' "=')
    return text if plain else json.dumps(text, ensure_ascii=False)
