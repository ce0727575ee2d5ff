"""Runs the model: prompt pieces, decode passes, and the next pass ahead of its time.

The device must not wait for Python.  While it computes a step, the pass that will most likely come
next is already built on the tokens that the step will draw, unread and still on the device; the
moment they are drawn, the pass is started.  If the next step feeds exactly those tokens it only has
to draw.  A sequence that ended, or is fed something else, is rolled back by that one token, and the
others notice nothing.

A pass is started when the one before it has ended, and not earlier: MLX writes into a cache in
place only if nothing that reads it is under way, and copies the whole cache otherwise.  Source:
`array::is_donatable` and `eval` of mlx; a cache of 128 MiB took 128 MiB more and 75 times as long
when the next step was evaluated behind the one under way (CPU build 0.32.4).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx

from brim.engine.mlx.batch import Batch, Form, States
from brim.engine.mlx.caches import SequenceCaches

Model = Callable[..., Any]
"""A model class of mlx-lm: (tokens of shape (B, n), cache=layers) -> logits (B, n, vocab_size)."""


class Ahead:
    """A decode pass that was built before anyone asked for it."""

    def __init__(self, members: Sequence[SequenceCaches], batch: Batch | None) -> None:
        self.members: list[SequenceCaches | None] = list(members)
        """Whose tokens it feeds, in the order of its rows; None for one that was rolled back."""
        self.checkpoints: list[object] = [member.checkpoint() for member in members]
        self.batch = batch
        """What it goes through; None where its sequences go one by one."""
        self.states: States = batch.states() if batch else []
        """Joined recurrent states before it."""
        self.logits: Any = None
        """Shape (B, vocab_size)."""
        self.fed: Sequence[int | None] = ()
        """The tokens, once it was started; the host has read them then."""

    @property
    def left(self) -> list[SequenceCaches]:
        """Members that were not rolled back."""
        return [member for member in self.members if member is not None]


class Decoder:
    """One model and the sequences that go through it.

    A sequence that is forked, cut or exported must be released first, one that is closed forgotten.

    Args:
        model: Loaded.
        form: How one pass may carry several sequences; None where each takes its own.
    """

    def __init__(self, model: Model, form: Form | None = Form.ROWS) -> None:
        self._model = model
        self.form = form
        self._batch: Batch | None = None
        # None for one that has its state back: then the batch is only to be parted.
        self._members: list[SequenceCaches | None] = []
        self._ahead: Ahead | None = None
        # Sequences that a pass under way reads and writes, and what is there when it has ended.
        self._busy: set[SequenceCaches] = set()
        self._awaited: list[Any] = []

    def read(self, sequence: SequenceCaches, tokens: Sequence[int]) -> None:
        """Feed a piece of a prompt, without computing what comes after it."""
        self.release(sequence)
        # Counted first: a model that fails has fed some layers, which a cut then takes back.
        sequence.num_tokens += len(tokens)
        self._model(mx.array([list(tokens)]), cache=sequence.layers)
        self._start([sequence], sequence.arrays())

    def decode(self, sequences: Sequence[SequenceCaches], tokens: Sequence[int]) -> Any:
        """Feed one token to each sequence, or take the pass that went ahead with it.

        Returns:
            Logits behind the tokens, shape (B, vocab_size).
        """
        logits, rows = self._take_ahead(dict(zip(sequences, tokens, strict=True)))
        fresh = [place for place, sequence in enumerate(sequences) if sequence not in rows]
        if not fresh:
            order = [rows[sequence] for sequence in sequences]
            is_whole = order == list(range(logits.shape[0]))
            return logits if is_whole else logits[mx.array(order)]
        members = [sequences[place] for place in fresh]
        computed = self._forward(members, mx.array([[tokens[place]] for place in fresh]))
        self._start(members, [computed, *self._arrays(members)])
        if not rows:
            return computed
        numbers = {place: number for number, place in enumerate(fresh)}
        return mx.stack(
            [
                computed[numbers[place]] if place in numbers else logits[rows[sequence]]
                for place, sequence in enumerate(sequences)
            ]
        )

    def build_ahead(self, sequences: Sequence[SequenceCaches], tokens: mx.array) -> None:
        """Build the pass that feeds these tokens, shape (B,), before the host has read them."""
        self._settle(sequences)
        ahead = Ahead(sequences, self._batch if self._members == list(sequences) else None)
        ahead.logits = self._forward(sequences, tokens[:, None])
        self._ahead = ahead

    def start_ahead(self, drawn: Mapping[SequenceCaches, int]) -> None:
        """Start what was built, now that its tokens are known."""
        ahead = self._ahead
        if ahead is not None:
            ahead.fed = [None if member is None else drawn[member] for member in ahead.members]
            self._start(ahead.left, [ahead.logits, *self._arrays(ahead.left)])

    def wait(self) -> None:
        """Until everything that was started has ended."""
        awaited, self._busy, self._awaited = self._awaited, set(), []
        # Forgotten before it can fail, or everybody's next step would fail once more.
        mx.eval(awaited)

    def release(self, sequence: SequenceCaches) -> None:
        """Make a sequence its own again: roll it back if it went ahead, and out of the batch."""
        ahead = self._ahead
        if ahead is not None and sequence in ahead.members:
            self._undo(ahead, ahead.members.index(sequence))
            if not ahead.left:
                # Nobody wants it any more, and an idle engine is to hold nothing for it.
                self._take_ahead({})
                self.wait()
        elif sequence in self._members:
            self._part()

    def forget(self, sequence: SequenceCaches) -> None:
        """Hold nothing of a sequence any more: others may be waiting for its memory."""
        self._busy.discard(sequence)
        self.release(sequence)

    def reset(self) -> None:
        """After a failure: forget what went ahead, and part the batch."""
        self._take_ahead({})
        self._part()
        self._busy, self._awaited = set(), []

    def _start(self, sequences: Sequence[SequenceCaches], arrays: list[Any]) -> None:
        """Have the device compute `arrays`, once no pass is under way on these sequences."""
        if not self._busy.isdisjoint(sequences):
            self.wait()
        # Not the arrays themselves are waited for: who holds one keeps it from being written in
        # place, and a cache's array is, to Python, the same object before and after the next pass.
        end = mx.depends(mx.zeros(()), arrays)
        mx.async_eval(end)
        self._busy.update(sequences)
        self._awaited.append(end)

    def _arrays(self, sequences: Sequence[SequenceCaches]) -> list[Any]:
        """Everything that a pass over these sequences has changed."""
        arrays = [array for sequence in sequences for array in sequence.arrays()]
        if self._batch is not None:
            arrays += [part for state in self._batch.states() for part in state if part is not None]
        return arrays

    def _take_ahead(self, wanted: Mapping[SequenceCaches, int]) -> tuple[Any, dict[Any, int]]:
        """Logits of the pass ahead, and their row for each sequence that is fed just that token."""
        ahead, self._ahead = self._ahead, None
        rows: dict[SequenceCaches, int] = {}
        if ahead is None:
            return None, rows
        for row, member in enumerate(ahead.members):
            if member is None:
                continue
            if ahead.fed and wanted.get(member) == ahead.fed[row]:
                rows[member] = row
            else:
                self._undo(ahead, row)
        if None in ahead.members:
            self._part()
        return ahead.logits, rows

    def _undo(self, ahead: Ahead, row: int) -> None:
        """Roll one row back, and let it go: who has closed a sequence wants its memory."""
        member, ahead.members[row] = ahead.members[row], None
        checkpoint, ahead.checkpoints[row] = ahead.checkpoints[row], None
        assert member is not None
        member.roll_back(checkpoint)
        if ahead.batch is not None:
            ahead.batch.give_back(row, ahead.states)
            self._members[row] = None

    def _settle(self, sequences: Sequence[SequenceCaches]) -> None:
        """Have a batch of exactly these sequences, where several can go together."""
        if len(sequences) == 1 or self.form is None:
            if any(sequence in self._members for sequence in sequences):
                self._part()
        elif self._members != list(sequences):
            self._part()
            self._batch = Batch([sequence.layers for sequence in sequences], self.form)
            self._members = [*sequences]

    def _forward(self, sequences: Sequence[SequenceCaches], tokens: mx.array) -> Any:
        """One token, shape (B, 1), for each sequence; logits of shape (B, vocab_size)."""
        self._settle(sequences)
        for sequence in sequences:  # counted first, as in `read`
            sequence.num_tokens += 1
        if self._batch is not None and self._members == list(sequences):
            return self._model(tokens, cache=self._batch.layers)[:, -1]
        alone = [
            self._model(tokens[row : row + 1], cache=sequence.layers)[:, -1]
            for row, sequence in enumerate(sequences)
        ]
        return alone[0] if len(alone) == 1 else mx.concatenate(alone)

    def _part(self) -> None:
        """Give every sequence of the batch its own recurrent state back."""
        if self._batch is not None:
            states = self._batch.states()
            for row, member in enumerate(self._members):
                if member is not None:
                    self._batch.give_back(row, states)
        self._batch, self._members = None, []
