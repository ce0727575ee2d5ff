"""Where an exception came from, in a form that may be written to a log.

Python's own traceback ends with the exception's message, which may quote what a client sent: a
character that would not encode, a field that would not parse.  Prompts and keys are in no log.
"""

import traceback


def where(exc: BaseException) -> str:
    """Kinds and frames of an exception and of what caused it, without a word of their messages.

    Example:
        >>> sent = "secret"
        >>> def parse(text):
        ...     return int(text)
        >>> try:
        ...     parse(sent)
        ... except ValueError as error:
        ...     found = where(error)
        >>> "ValueError" in found, "in parse" in found, "secret" in found
        (True, True, False)
    """
    parts: list[str] = []
    seen: set[int] = set()
    current: BaseException | None = exc
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        parts.append(f"{type(current).__name__}\n{''.join(_frames(current))}")
        current = current.__cause__ or (
            None if current.__suppress_context__ else current.__context__
        )
    return "caused by ".join(parts).rstrip("\n")


def _frames(exc: BaseException) -> list[str]:
    return traceback.format_list(traceback.extract_tb(exc.__traceback__))
