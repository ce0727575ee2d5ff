"""The engine contract: a token engine feeds tokens and returns sampled tokens.

Everything about text, fairness and memory budgets lives above it.  One suite, tests/contract, runs
every rule below on every engine; the toy engine (toy.py) is the copy to read first.

One thread owns an engine: no method but `request_abort` may be called from another one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from brim.core.memory import Footprint
from brim.core.plan import Plan
from brim.core.sampling import SamplingParams
from brim.core.step import StepPlan, StepResult
from brim.core.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


Allocate = Callable[[int], memoryview]
"""Makes room for an exported block: called once with its size in bytes, gives a writable view."""


OnProgress = Callable[[float], None]
"""Is told how much of something is done, from 0 to 1."""


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What this engine can do with the model it has loaded, from the architecture and checked.

    A backend's own word is not taken: llama.cpp says that Mamba's state can shift.
    """

    can_truncate: bool
    """`truncate` keeps any prefix; False where state cannot be cut (recurrent, sliding window)."""
    can_fork_prefix: bool
    """`fork` copies any prefix; False where only the whole sequence can be copied."""
    forks_share_kv: bool
    """A fork takes no cells of the pool until it is fed; False where it is a copy."""
    batches_sequences: bool
    """One pass over the weights serves all sequences of a step; False where each takes its own."""
    can_export_range: bool
    """`export_kv` takes any part of a sequence, and `import_kv` appends it; False where only whole
    sequences can be kept, and only empty ones filled."""
    can_shift: bool
    """`shift` drops tokens from the middle."""
    can_resize_kv: bool
    maps_weights: bool
    """Weights are file pages, not anonymous memory."""
    kv_types: frozenset[str]
    """What this model's cache can be stored as here."""
    samplers: frozenset[str]
    """Names of the SamplingParams fields that have an effect here."""
    tile_rows: int = 16
    """Rows of a step that the kernels take together: whole tiles cost less for each row."""
    foreign_cell_s: float = 0.0
    """Seconds that a row spends on a cell of another sequence, which it may not look at; 0 where
    sequences have their cells to themselves, or where it is not known."""
    exact_profile: bool
    """Loaded so that results do not depend on what else is in the batch, to the bit."""


class Engine(ABC):
    """One loaded model.

    A sequence is a list of tokens whose KV is in memory, named by a small int.  Its position is
    `num_tokens`; feeding appends.  The token that a step samples is *not* part of the sequence
    until it is fed, so a caller may drop it, and a stopped sequence holds exactly what was fed.
    """

    @abstractmethod
    def load(self, plan: Plan, on_progress: OnProgress | None = None) -> None:
        """Load the model as planned, all of its weights in memory, and run it once; call once.

        Args:
            plan: How.
            on_progress: Called now and then, on this thread, with the share that is done.

        Raises:
            ModelFileError: The file is damaged or of an architecture that the backend lacks.
            EngineError: The backend could not load it for another reason, which is quoted.
        """

    @abstractmethod
    def shutdown(self) -> None:
        """Free everything; the engine cannot be used afterwards.  Safe to call twice."""

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What can be asked of the loaded model."""

    @property
    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """The model's own tokenizer."""

    @abstractmethod
    def footprint(self) -> Footprint:
        """Bytes that the backend says it took, by term."""

    @abstractmethod
    def open(self, sampling: SamplingParams, max_tokens: int | None = None) -> int:
        """A new empty sequence, with its own random state.

        Args:
            sampling: How its tokens are drawn.
            max_tokens: Most tokens that will be fed to it, where that is known: an engine that
                gives each sequence memory of its own takes as much at once, and does not copy the
                sequence whenever it grows.  Feeding more is allowed.

        Raises:
            Busy: All `max_sequences` of the plan are open.
            InvalidRequest: A sampling value is out of the backend's range.
        """

    @abstractmethod
    def close(self, seq_id: int) -> None:
        """Forget a sequence and free its cells; the id may be given out again.

        Raises:
            EngineError: No such sequence is open.
        """

    @abstractmethod
    def num_tokens(self, seq_id: int) -> int:
        """How many tokens have been fed to the sequence."""

    @abstractmethod
    def fork(self, source: int, target: int, num_tokens: int) -> None:
        """Make the empty sequence `target` share the first `num_tokens` of `source`.

        The target keeps its own sampling parameters; its penalties see the shared tokens.

        Raises:
            EngineError: The target is not empty, the source is shorter, or the state cannot be cut.
        """

    @abstractmethod
    def truncate(self, seq_id: int, num_tokens: int) -> None:
        """Keep the first `num_tokens`; the random state starts again from the seed.

        Raises:
            EngineError: The sequence is shorter, or the state cannot be cut there.
        """

    def can_keep(self, seq_id: int, num_tokens: int) -> bool:
        """Whether `truncate` and `fork` can keep just the first `num_tokens` of this sequence now.

        More than `can_truncate` promises: layers with a window may still hold what a cut near the
        end looks back to.

        Raises:
            EngineError: No such sequence is open.
        """
        length = self.num_tokens(seq_id)
        return num_tokens in (0, length) or (
            num_tokens <= length and self.capabilities.can_truncate
        )

    def move(self, source: int, target: int) -> None:
        """Hand everything that `source` holds to the empty `target`, and close `source`.

        What a caller does that goes on with a sequence under other sampling parameters: where a
        fork is a copy, this is none.

        Raises:
            EngineError: The target is not empty.
        """
        self.fork(source, target, self.num_tokens(source))
        self.close(source)

    @abstractmethod
    def shift(self, seq_id: int, num_kept: int, num_dropped: int) -> None:
        """Drop tokens behind the first `num_kept`, and move those behind them up.

        An approximation that users choose: the later tokens were computed in sight of those that
        are gone.  The sequence is no prefix of anything afterwards.  The random state goes on.

        Raises:
            EngineError: The sequence is shorter than the two, or cannot be shifted.
            Busy: What moves is shared with others, and there are no free cells for a copy.
        """

    @property
    @abstractmethod
    def kv_identity(self) -> str:
        """What a block of KV is of: model, backend and its version, KV types.

        Blocks can be imported by an engine of equal identity alone.
        """

    @abstractmethod
    def export_kv(
        self,
        seq_id: int,
        start: int = 0,
        end: int | None = None,
        *,
        allocate: Allocate | None = None,
    ) -> memoryview:
        """Tokens `start` to `end` of a sequence and their state as one block with a checksum.

        The block is self-describing: it holds the identity, its place and its tokens.

        Args:
            seq_id: The sequence.
            start: First token; other than 0 only where `can_export_range`.
            end: Behind the last token; the sequence's end where None, as it must be elsewhere.
            allocate: Where the block goes.  None: a mapped temporary file, so that where that lies
                on a disk (and not in a tmpfs) the kernel may write it out and drop its pages;
                release the view to free it.

        Raises:
            EngineError: The part is empty, not the sequence's, or no such part can be exported.
            StoreError: There is no room for the file.
            Busy: The backend needs a free sequence for it and all are open.
        """

    @abstractmethod
    def import_kv(self, seq_id: int, blob: bytes | memoryview) -> None:
        """Append a block that `export_kv` made with the same identity to a sequence.

        The sequence must hold exactly as many tokens as stand before the block; that they are the
        same ones is the caller's to know.

        Raises:
            StoreError: The block is damaged, of another identity, or of another place; the
                sequence is as it was.
            DoesNotFit: The pool has too few free cells, or the window is too short.
            Busy: The backend needs a free sequence for it and all are open.
        """

    @abstractmethod
    def resize_kv(self, num_tokens: int) -> None:
        """Change the pool to `num_tokens` cells, keeping every sequence.

        This is the only way to give KV memory back: closing sequences frees cells, not bytes.
        Logits of the last step are gone afterwards.

        Raises:
            DoesNotFit: Open sequences need more cells than that; nothing was changed.
            StoreError: There is no room for them on their way; nothing was changed.
            EngineError: They are lost, and the engine was shut down.
        """

    @abstractmethod
    def submit(self, plan: StepPlan) -> None:
        """Start one step; exactly one `collect` must follow, and nothing else on its sequences.

        Raises:
            EngineError: The plan breaks a limit (rows, outputs, window, unknown token or sequence)
                or the backend failed; no sequence has changed, but for those of a failed step
                whose state could not be taken back: they can only be closed.
            Busy: The pool has too few free cells; no sequence has changed.
        """

    @abstractmethod
    def collect(self) -> StepResult:
        """Wait for the submitted step and draw its tokens.

        Raises:
            EngineError: Nothing was submitted, the backend failed, or the step was aborted.
        """

    def step(self, plan: StepPlan) -> StepResult:
        """`submit` and `collect` together."""
        self.submit(plan)
        return self.collect()

    @abstractmethod
    def request_abort(self) -> None:
        """Give up the running step if the backend can; the one call allowed from another thread.

        For a step whose every sequence was cancelled: sequences in it must be closed afterwards.
        """

    @abstractmethod
    def logits(self, seq_id: int) -> NDArray[np.float32]:
        """Raw logits behind the last token drawn for `seq_id`, until the next step.

        A view, shape (vocab_size,); copy it to keep it.  For equality
        tests and quality measurements, not for serving.
        """
