"""The teaching engine: no weights, complete, deterministic.  Read it beside base.py.

Its model turns the whole token history into a hash and the hash into logits, so that a token lost,
doubled or mixed up with another sequence's changes everything after it.  Its KV cell is one hash,
shared between forks as llama.cpp shares cells.
"""

import zlib
from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from brim.core.memory import Footprint
from brim.core.plan import Plan
from brim.core.sampling import SamplingParams
from brim.core.step import StepPlan, StepResult
from brim.engine import guards
from brim.engine import numpy_sampler as sampler
from brim.engine.base import Capabilities, Engine
from brim.engine.byte_tokenizer import VOCAB_SIZE, ByteTokenizer
from brim.errors import Busy, DoesNotFit, EngineError, StoreError


class Cell:
    """One token's state: the hash of everything up to it, and how many sequences hold it."""

    __slots__ = ("num_holders", "state", "token")

    def __init__(self, token: int, before: int) -> None:
        self.token = token
        self.state = zlib.crc32(token.to_bytes(2, "little"), before)
        self.num_holders = 1


class ToySequence:
    """A growing list of cells with its sampling state."""

    def __init__(self, sampling: SamplingParams) -> None:
        self.sampling = sampling
        self.cells: list[Cell] = []
        self.rng = np.random.default_rng(sampling.seed)
        self.logits: sampler.Logits = np.zeros(VOCAB_SIZE, np.float32)

    @property
    def tokens(self) -> list[int]:
        return [cell.token for cell in self.cells]


def toy_logits(state: int) -> sampler.Logits:
    """Logits for a history's hash: lower-case words, now and then an end."""
    logits = np.random.default_rng(state).standard_normal(VOCAB_SIZE).astype(np.float32)
    logits[97:123] += 5.0
    logits[32] += 6.0
    logits[ByteTokenizer.EOS] += 2.5
    return logits


class ToyEngine(Engine):
    """See the module's docstring; everything that can be asked of an engine works."""

    def load(self, plan: Plan) -> None:
        self._plan = plan
        self._num_cells = plan.kv_tokens
        self._num_used = 0
        self._sequences: dict[int, ToySequence] = {}
        self._submitted: StepPlan | None = None

    def shutdown(self) -> None:
        self._sequences = {}

    capabilities = Capabilities(
        can_truncate=True, can_fork_prefix=True, can_resize_kv=True, maps_weights=True,
        kv_types=frozenset({"f16"}), samplers=sampler.SAMPLERS, exact_profile=True,
    )  # fmt: skip
    tokenizer = ByteTokenizer()

    def footprint(self) -> Footprint:
        return Footprint(
            weights_bytes=0, mapped_weights_bytes=0, kv_bytes=8 * self._num_cells, compute_bytes=0
        )

    def open(self, sampling: SamplingParams) -> int:
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

    def export_kv(self, seq_id: int) -> memoryview:
        body = msgspec.msgpack.encode(guards.known(self._sequences, seq_id).tokens)
        return memoryview(zlib.crc32(body).to_bytes(4, "little") + body)

    def import_kv(self, seq_id: int, blob: bytes | memoryview) -> None:
        sequence, body = guards.known(self._sequences, seq_id), bytes(blob[4:])
        guards.check_fork(0, len(sequence.cells), 0)
        if zlib.crc32(body).to_bytes(4, "little") != bytes(blob[:4]):
            raise StoreError("a stored KV block is damaged (its checksum differs)")
        tokens = msgspec.msgpack.decode(body, type=list[int])
        if len(tokens) > self._num_cells - self._num_used:
            raise DoesNotFit(f"{len(tokens)} stored tokens do not fit the KV pool")
        self._append(sequence, tokens)

    def resize_kv(self, num_tokens: int) -> None:
        guards.check_resize(self._num_used, num_tokens)
        self._num_cells = num_tokens

    def submit(self, plan: StepPlan) -> None:
        lengths = {seq_id: len(sequence.cells) for seq_id, sequence in self._sequences.items()}
        guards.check_step(plan, self._plan, lengths, VOCAB_SIZE, self._submitted)
        if plan.num_scheduled_tokens > self._num_cells - self._num_used:
            raise Busy("the KV pool is full", retry_after_s=1.0)
        self._submitted = plan

    def collect(self) -> StepResult:
        if self._submitted is None:
            raise EngineError("toy: collect without submit")
        plan, self._submitted, sampled = self._submitted, None, []
        for feed in plan.feeds:
            sequence = self._sequences[feed.seq_id]
            self._append(sequence, feed.tokens)
            if feed.sample:
                sequence.logits = toy_logits(sequence.cells[-1].state)
                sampled.append(
                    sampler.draw(feed, sequence.logits, sequence.tokens, sequence.sampling,
                                 sequence.rng, self.tokenizer.eog_tokens)
                )  # fmt: skip
        return StepResult(sampled)

    def request_abort(self) -> None:
        """A toy step is over before anyone could ask."""

    def logits(self, seq_id: int) -> NDArray[np.float32]:
        return guards.known(self._sequences, seq_id).logits

    def _append(self, sequence: ToySequence, tokens: Sequence[int]) -> None:
        for token in tokens:
            before = sequence.cells[-1].state if sequence.cells else 0
            sequence.cells.append(Cell(token, before))
        self._num_used += len(tokens)

    def _drop(self, cells: Sequence[Cell]) -> None:
        for cell in cells:
            cell.num_holders -= 1
            self._num_used -= cell.num_holders == 0
