"""Figures in sentences."""


def some(names: list[str] | tuple[str, ...], num_shown: int = 3) -> str:
    """The first names of a list, and how many more there are.

    Example:
        >>> some(["a", "b", "c", "d"])
        'a, b, c and 1 more'
    """
    shown = ", ".join(names[:num_shown])
    return f"{shown} and {len(names) - num_shown} more" if len(names) > num_shown else shown


def count(number: int, thing: str) -> str:
    """A number and its noun.

    Example:
        >>> count(1, "worker"), count(2, "worker")
        ('1 worker', '2 workers')
    """
    return f"{number} {thing}" + ("" if number == 1 else "s")
