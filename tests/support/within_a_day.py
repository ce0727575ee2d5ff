"""Budgets renew at midnight, UTC, also while a test is using one up."""

import functools
import time
from collections.abc import Callable
from typing import ParamSpec

import pytest

from brim.apps.day import day_of

P = ParamSpec("P")


def within_a_day(test: Callable[P, None]) -> Callable[P, None]:
    """A test of a server's budget, whose day is the system's: what midnight spoils is skipped."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        day = day_of(time.time())
        try:
            test(*args, **kwargs)
        except BaseException:
            if day_of(time.time()) != day:
                pytest.skip("midnight, UTC, has come, and every budget was renewed")
            raise

    return run
