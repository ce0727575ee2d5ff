"""Days as budgets count them: in UTC, so that they renew at one moment wherever a laptop goes."""

from datetime import UTC, datetime, timedelta

DAY_S = 86_400
"""UTC has no days of 23 or 25 hours."""


def day_of(unix_s: float) -> str:
    """The day of a moment.

    Example:
        >>> day_of(86_399.5), day_of(86_400)
        ('1970-01-01', '1970-01-02')
    """
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d")


def days_before(day: str, num_days: int) -> str:
    """The day that lies `num_days` before another.

    Example:
        >>> days_before("2026-03-01", 1)
        '2026-02-28'
    """
    return (datetime.fromisoformat(day) - timedelta(days=num_days)).strftime("%Y-%m-%d")


def renews_in_s(unix_s: float) -> float:
    """Seconds until the next day begins.

    Example:
        >>> renews_in_s(86_399.5), renews_in_s(86_400)
        (0.5, 86400)
    """
    return DAY_S - unix_s % DAY_S


def in_words(seconds: float) -> str:
    """A wait for a sentence, rounded up, so that nobody comes too early.

    Example:
        >>> in_words(12), in_words(119.2), in_words(11_460)
        ('12 s', '2 min', '3 h 11 min')
    """
    if seconds <= 99:
        return f"{-int(-seconds // 1)} s"
    hours, minutes = divmod(-int(-seconds // 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
