"""Whose energy it was: the joules of a moment, shared among apps by the tokens of that moment.

The machine's meter knows no apps.  What it counts while the server works is taken to be the
server's, idle power included: without requests the machine could have slept.
"""

from collections import Counter

PROMPT_TOKEN_SHARE = 0.25
"""What a prompt's token costs of a drawn one: prompts are read in batches.  Measured with llama.cpp
on a 1.24 B Q4_K_M model and two x86 cores: 143 tokens read a second, 41 drawn."""


class EnergyShare:
    """Tokens since the last split, by app."""

    def __init__(self) -> None:
        self._weights: Counter[str] = Counter()
        self._carried_j = 0.0

    def note(self, app: str, *, num_prompt_tokens: int = 0, num_completion_tokens: int = 0) -> None:
        """Tokens of an app's request were read or drawn."""
        # Whole numbers of prompt tokens, so that sums do not depend on their order.
        weight = num_prompt_tokens + round(num_completion_tokens / PROMPT_TOKEN_SHARE)
        self._weights[app] += weight

    def split(self, joules: float, *, is_working: bool) -> dict[str, float]:
        """App -> its joules, which add up to those that were counted.

        Args:
            joules: Counted since the last split.
            is_working: Whether requests are in work.  What is counted while none has brought a
                token yet goes to those of the next split; what is counted without any is nobody's.

        Example:
            >>> share = EnergyShare()
            >>> share.note("mail", num_completion_tokens=3)
            >>> share.note("notes", num_completion_tokens=1)
            >>> share.split(8.0, is_working=True)
            {'mail': 6.0, 'notes': 2.0}
        """
        joules += self._carried_j
        self._carried_j = 0.0
        total = self._weights.total()
        if not total:
            self._carried_j = joules if is_working else 0.0
            return {}
        shares = {app: joules * weight / total for app, weight in self._weights.items()}
        self._weights.clear()
        return shares
