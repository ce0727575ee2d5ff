"""Figures for people: one spelling and one precision wherever they are printed."""

MIB, GIB = 2**20, 2**30

LEAST_GIB = 0.1
"""Below it, two decimals of a GiB are no longer two digits."""


def gib(num_bytes: int) -> str:
    """Bytes for a reader: hundredths of a GiB, which tell quants of one model apart.

    Example:
        >>> gib(5 * 2**30), gib(12 * 2**20)
        ('5.00 GiB', '12 MiB')
    """
    if num_bytes < LEAST_GIB * GIB:
        return f"{num_bytes / MIB:.0f} MiB"
    return f"{num_bytes / GIB:.2f} GiB"
