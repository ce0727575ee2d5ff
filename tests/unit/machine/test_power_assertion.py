"""The assertion that keeps a Mac awake, on stand-ins for the two libraries that it calls."""

import ctypes
from typing import Any

import pytest

from brim.machine.power_assertion import PowerAssertion


class Call:
    """A function of a library: its declared types, and what it was called with."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, *arguments: Any) -> Any:
        self.calls.append(arguments)
        return self.answer(*arguments) if callable(self.answer) else self.answer


class IOKit:
    """Gives assertions numbers from 41 on."""

    def __init__(self, failure: int = 0) -> None:
        self.failure = failure
        self.held: list[int] = []
        self.num_made = 0
        self.IOPMAssertionCreateWithName = Call(self._create)
        self.IOPMAssertionRelease = Call(self._release)

    def _create(self, kind: int, level: int, name: int, assertion: Any) -> int:
        if not self.failure:
            self.num_made += 1
            number = ctypes.cast(assertion, ctypes.POINTER(ctypes.c_uint32))
            number[0] = 40 + self.num_made
            self.held.append(number[0])
        return self.failure

    def _release(self, assertion: int) -> int:
        self.held.remove(assertion)
        return 0


class CoreFoundation:
    """Keeps account of strings; pointers do not fit into 32 bits."""

    def __init__(self) -> None:
        self.texts: dict[int, bytes] = {}
        self.seen: list[bytes] = []
        self.CFStringCreateWithCString = Call(self._create)
        self.CFRelease = Call(self.texts.pop)

    def _create(self, allocator: object, text: bytes, encoding: int) -> int:
        assert (allocator, encoding) == (None, 0x08000100)
        pointer = 2**40 + len(self.seen)
        self.texts[pointer] = text
        self.seen.append(text)
        return pointer


@pytest.fixture
def libraries() -> tuple[IOKit, CoreFoundation]:
    return IOKit(), CoreFoundation()


def test_one_assertion_is_held_and_released(libraries: tuple[IOKit, CoreFoundation]) -> None:
    """However often it is wanted there is one, and after it is not wanted there is none."""
    iokit, core = libraries
    assertion = PowerAssertion(iokit, core)
    assert [assertion.hold(wanted) for wanted in (True, True, False, False, True)] == [
        True, True, False, False, True,
    ]  # fmt: skip
    assert (iokit.num_made, iokit.held) == (2, [42])
    assertion.close()
    assert (iokit.held, assertion.is_held) == ([], False)


def test_constants_are_apples(libraries: tuple[IOKit, CoreFoundation]) -> None:
    """Type, level and encoding are those of Apple's headers, and no string is left over."""
    iokit, core = libraries
    assertion = PowerAssertion(iokit, core)
    assertion.hold(True)
    (arguments,) = iokit.IOPMAssertionCreateWithName.calls
    assert (arguments[0], arguments[1], arguments[2]) == (2**40, 255, 2**40 + 1)
    assert core.seen == [b"PreventUserIdleSystemSleep", b"brim is generating"]
    assert core.texts == {}
    assertion.close()


def test_a_refusal_is_no_error(libraries: tuple[IOKit, CoreFoundation]) -> None:
    """Where the system refuses nothing is held, strings are given back, and it is tried again."""
    iokit, core = libraries
    assertion = PowerAssertion(iokit, core)
    iokit.failure = -536870201
    assert assertion.hold(True) is False
    assert core.texts == {}
    iokit.failure = 0
    assert assertion.hold(True) is True
    assertion.close()


def test_elsewhere_nothing_is_held() -> None:
    """Off a Mac there is no such call, and wanting it is no error."""
    assertion = PowerAssertion()
    if assertion.is_available:
        pytest.skip("this is a Mac")
    assert assertion.hold(True) is False
    assertion.close()
