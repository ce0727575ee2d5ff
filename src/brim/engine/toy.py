"""The teaching engine: no weights, complete, deterministic.  Read it beside base.py.

Its model turns the whole token history into a hash and the hash into logits, so that a token lost,
doubled or mixed up with another sequence's changes everything after it.  Its KV cell is one hash,
shared between forks as llama.cpp shares cells.
"""

import ctypes
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from brim.core.memory import Footprint
from brim.core.plan import Plan
from brim.core.sampling import SamplingParams
from brim.core.step import StepPlan, StepResult
from brim.engine import guards, kv_block
from brim.engine import numpy_sampler as sampler
from brim.engine.base import Allocate, Capabilities, Engine, OnProgress
from brim.engine.byte_tokenizer import VOCAB_SIZE, ByteTokenizer
from brim.engine.dry import DryBreakers
from brim.errors import Busy, DoesNotFit


class Cell:
    """One token's state: the hash of everything up to it, and how many sequences hold it."""

    def __init__(self, token: int, state: int) -> None:
        self.token, self.state, self.num_holders = token, state, 1


class ToySequence:
    """A growing list of cells with its sampling state."""

    def __init__(self, sampling: SamplingParams) -> None:
        self.sampling, self.rng = sampling, np.random.default_rng(sampling.seed)
        self.cells: list[Cell] = []
        self.logits: sampler.Logits = np.zeros(VOCAB_SIZE, np.float32)

    @property
    def tokens(self) -> list[int]:
        return [cell.token for cell in self.cells]


def toy_logits(state: int) -> sampler.Logits:
    """Logits for a history's hash: lower-case words, now and then an end."""
    logits = np.random.default_rng(state).standard_normal(VOCAB_SIZE).astype(np.float32)
    logits[[*b"abcdefghijklmnopqrstuvwxyz"]] += 5.0
    logits[[*b" ", ByteTokenizer.EOS]] += 6.0, 2.5
    return logits


class ToyEngine(Engine):
    """See the module's docstring; everything that can be asked of an engine works."""

    def load(self, plan: Plan, on_progress: OnProgress | None = None) -> None:
        self._plan, self._num_cells, self._num_used = plan, plan.kv_tokens, 0
        self._sequences: dict[int, ToySequence] = {}
        self._submitted: StepPlan | None = None

    def shutdown(self) -> None:
        """Nothing is held."""

    capabilities = Capabilities(
        can_truncate=True, can_fork_prefix=True, forks_share_kv=True,
        can_export_range=True, can_shift=True,
        batches_sequences=True, can_resize_kv=True, maps_weights=True,
        kv_types=frozenset({"f16"}), samplers=sampler.SAMPLERS, exact_profile=True,
    )  # fmt: skip
    tokenizer = ByteTokenizer()
    dry_breakers = DryBreakers(tokenizer)

    def footprint(self) -> Footprint:
        return Footprint(weights_bytes=0, mapped_weights_bytes=0, kv_bytes=8 * self._num_cells)

    def open(self, sampling: SamplingParams, max_tokens: int | None = None) -> int:
        guards.check_sampling(sampling, self.capabilities.samplers, VOCAB_SIZE)
        seq_id = guards.free_slot(self._sequences, self._plan.max_sequences)
        self._sequences[seq_id] = ToySequence(sampling)
        return seq_id

    def close(self, seq_id: int) -> None:
        self._drop(guards.known(self._sequences, seq_id).cells)
        del self._sequences[seq_id]

    def num_tokens(self, seq_id: int) -> int:
        return len(guards.known(self._sequences, seq_id).cells)

    def fork(self, source: int, target: int, num_tokens: int) -> None:
        src, dst = (guards.known(self._sequences, seq_id) for seq_id in (source, target))
        guards.check_fork(len(src.cells), len(dst.cells), num_tokens)
        dst.cells = src.cells[:num_tokens]
        for cell in dst.cells:
            cell.num_holders += 1

    def truncate(self, seq_id: int, num_tokens: int) -> None:
        sequence = guards.known(self._sequences, seq_id)
        guards.check_truncate(len(sequence.cells), num_tokens)
        self._drop(sequence.cells[num_tokens:])
        del sequence.cells[num_tokens:]
        sequence.rng = np.random.default_rng(sequence.sampling.seed)

    def shift(self, seq_id: int, num_kept: int, num_dropped: int) -> None:
        cells = guards.known(self._sequences, seq_id).cells
        guards.check_shift(len(cells), num_kept, num_dropped)
        self._drop(cells[num_kept : num_kept + num_dropped])
        del cells[num_kept : num_kept + num_dropped]

    kv_identity = "toy"

    def export_kv(
        self,
        seq_id: int,
        start: int = 0,
        end: int | None = None,
        *,
        allocate: Allocate | None = None,
    ) -> memoryview:
        cells = guards.known(self._sequences, seq_id).cells
        cells = cells[start : guards.check_range(len(cells), start, end)]
        states = np.array([cell.state for cell in cells], np.uint32)

        def fill(address: int, size: int) -> int:
            ctypes.memmove(address, states.ctypes.data, size)
            return size

        tokens = [cell.token for cell in cells]
        return kv_block.write(
            self.kv_identity, tokens, states.nbytes, fill, start=start, allocate=allocate
        )

    def import_kv(self, seq_id: int, blob: bytes | memoryview) -> None:
        sequence = guards.known(self._sequences, seq_id)
        block = kv_block.read(self.kv_identity, blob)
        kv_block.check_place(block, len(sequence.cells), self._plan.context_tokens)
        guards.check_room(len(block.tokens), self._num_cells - self._num_used, DoesNotFit)
        states = np.frombuffer(block.state, np.uint32).tolist()
        sequence.cells += map(Cell, block.tokens, states)
        self._num_used += len(states)

    def resize_kv(self, num_tokens: int) -> None:
        guards.check_resize(self._num_used, num_tokens)
        self._num_cells = num_tokens

    def submit(self, plan: StepPlan) -> None:
        lengths = {seq_id: len(sequence.cells) for seq_id, sequence in self._sequences.items()}
        guards.check_step(plan, self._plan, lengths, VOCAB_SIZE, self._submitted)
        guards.check_room(plan.num_scheduled_tokens, self._num_cells - self._num_used, Busy)
        self._submitted = plan

    def collect(self) -> StepResult:
        plan, self._submitted, sampled = guards.submitted(self._submitted), None, []
        for feed in plan.feeds:
            sequence = self._sequences[feed.seq_id]
            self._append(sequence, feed.tokens)
            if feed.sample:
                sequence.logits = toy_logits(sequence.cells[-1].state)
                sampled.append(
                    sampler.draw(feed, sequence, self.tokenizer.eog_tokens, self.dry_breakers)
                )
        return StepResult(sampled)

    def request_abort(self) -> None:
        """A toy step is over before anyone could ask."""

    def logits(self, seq_id: int) -> NDArray[np.float32]:
        return guards.known(self._sequences, seq_id).logits

    def _append(self, sequence: ToySequence, tokens: Sequence[int]) -> None:
        for token in tokens:
            before = sequence.cells[-1].state if sequence.cells else 0
            state = zlib.crc32(token.to_bytes(2, "little"), before)
            sequence.cells.append(Cell(token, state))
        self._num_used += len(tokens)

    def _drop(self, cells: Sequence[Cell]) -> None:
        for cell in cells:
            cell.num_holders -= 1
            self._num_used -= cell.num_holders == 0
