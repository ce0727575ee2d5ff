"""Stop strings in a stream of text: an Aho-Corasick automaton, one transition a character.

Which one wins: the stop string that is *complete* first, because generating stops there; of those
that are complete at the same character, the longest, which is the one that begins first.  Text
is cut where the winner begins.  So with the stops "b" and "abc", "abc" in the text is cut to "a".
"""

from functools import lru_cache

import msgspec


class _State(msgspec.Struct):
    """What the end of the text may be the beginning of."""

    depth: int
    """Characters of the text that are held back here."""
    goto: dict[str, "_State"]
    fail: "_State | None" = None
    """The state of the longest proper suffix; None at the root."""
    complete: str | None = None
    """The longest stop string that ends here."""


class _Automaton(msgspec.Struct, frozen=True):
    root: _State
    first_characters: frozenset[str]


class StopMatcher:
    """Releases text as soon as it cannot be part of a stop string.

    Args:
        stops: None of them empty.

    Raises:
        ValueError: A stop string is empty: it would be complete before the first token.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        automaton = _build(stops)
        self._root = automaton.root
        self._begins_nowhere = automaton.first_characters.isdisjoint
        self._state = automaton.root
        self._held = ""

    def feed(self, text: str) -> tuple[str, str | None]:
        """Text that may be shown now, and the stop string that was completed, if one was."""
        state = self._state
        root = self._root
        if state is root and self._begins_nowhere(text):
            return text, None
        num_held = state.depth
        for position, character in enumerate(text, 1):
            while (following := state.goto.get(character)) is None and state.fail is not None:
                state = state.fail
            state = following or root
            if state.complete is not None:
                self._state, held, self._held = root, self._held, ""
                return (held + text)[: num_held + position - len(state.complete)], state.complete
        text = self._held + text
        self._state = state
        cut = len(text) - state.depth
        self._held = text[cut:]
        return text[:cut], None

    def finish(self) -> str:
        """What was held back, now that nothing can complete it."""
        held, self._held, self._state = self._held, "", self._root
        return held


# A server sees the same few sets again and again, and every choice of a request shares one.  At
# the limits of the API (16 strings of 256 characters) an automaton is about a megabyte.
@lru_cache(maxsize=8)
def _build(stops: tuple[str, ...]) -> _Automaton:
    root = _State(depth=0, goto={})
    for stop in stops:
        if not stop:
            raise ValueError("a stop string is empty")
        state = root
        for character in stop:
            state = state.goto.setdefault(character, _State(depth=state.depth + 1, goto={}))
        state.complete = stop
    # Breadth first: the fail state of a child is found from its parent's, which is shallower.
    level = [root]
    while level:
        level = [child for state in level for child in _link_children(root, state)]
    return _Automaton(root, frozenset(stop[0] for stop in stops))


def _link_children(root: _State, state: _State) -> list[_State]:
    for character, child in state.goto.items():
        suffix = state.fail
        while suffix is not None and character not in suffix.goto:
            suffix = suffix.fail
        child.fail = root if suffix is None else suffix.goto[character]
        if child.complete is None:
            child.complete = child.fail.complete
    return list(state.goto.values())
