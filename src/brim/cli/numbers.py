"""Lists of numbers as options of the command line."""

import math

import typer


def whole_numbers(text: str, option: str, *, least: int = 0) -> list[int]:
    """Whole numbers separated by commas.

    Raises:
        typer.BadParameter: A part is no number, or below `least`.

    Example:
        >>> whole_numbers("1,4", "--concurrency")
        [1, 4]
    """
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < least:
        raise typer.BadParameter(f"{option} takes numbers from {least} up, as 1,4; not '{text}'")
    return found


def decimals(text: str, option: str) -> list[float]:
    """Positive numbers separated by commas.

    Raises:
        typer.BadParameter: A part is no number, infinite, or not above zero.

    Example:
        >>> decimals("0.5,2", "--rates")
        [0.5, 2.0]
    """
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < value < math.inf for value in found):
        raise typer.BadParameter(f"{option} takes numbers above 0, as 0.5,2; not '{text}'")
    return found
