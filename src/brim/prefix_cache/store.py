"""The prefix cache on disk, as the scheduler sees it: find, read, write, and never an exception.

Everything but the writer's own thread runs on the caller's; nothing there waits for the disk, but
for pages of a file that is mapped.  What goes wrong is counted by reason, and said in one event.
"""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from brim.core.cache import CacheOptions, StoreStats
from brim.errors import BrimError, StoreError
from brim.prefix_cache import files
from brim.prefix_cache.filling import Allocate, Filling, Skipped, why_unfilled
from brim.prefix_cache.format import PAGE_BYTES, Header, directory_name, prefix_hash
from brim.prefix_cache.health import Health
from brim.prefix_cache.index import MIN_GAIN_TOKENS, Entry, Index
from brim.prefix_cache.model_files import model_bytes, model_hash
from brim.prefix_cache.room import Room, changed_at
from brim.prefix_cache.segment import Lookup, Model, Segment, Skip
from brim.prefix_cache.writer import (
    Arrived,
    Changed,
    Dropped,
    Opened,
    Writer,
    refusal_of,
)

__all__ = ["Allocate", "Lookup", "Model", "PrefixCache", "Segment", "Skip"]

CLOSE_LIMIT_S = 10.0
"""The default in flight, 256 MiB, at 25 MB/s; a disk that hangs must not stop an exit."""

MAX_INFLIGHT = 64
"""Each is an open file and a mapping; small entries would be thousands below the bound in bytes."""


class PrefixCache:
    """Segments of one model's prompts in a directory that all models and processes share.

    Args:
        options: The directory and its bounds.
        model: Of whom the entries are.
        can_cut: The engine can truncate a sequence anywhere.
        can_export_range: The engine exports any part of a sequence; without it, or where it cannot
            cut, every entry is a whole prefix from 0.
        clock: Seconds since 1970.
    """

    def __init__(
        self,
        options: CacheOptions,
        model: Model,
        *,
        can_cut: bool,
        can_export_range: bool,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._options, self._model, self._clock = options, model, clock
        self._can_cut = can_cut
        self._takes_ranges = can_cut and can_export_range
        self._model_hash = model_hash(model.paths)
        self._model_bytes = model_bytes(model.paths)
        self._own = directory_name(model.identity, self._model_hash)
        self._root = Path(options.directory)
        self._room = Room(options, self._own, model.name, model.paths, clock())
        self._writer = Writer(self._root, self._own, self._room, clock)
        self._index = Index(
            can_cut=can_cut, min_gain_tokens=min(MIN_GAIN_TOKENS, options.min_tokens)
        )
        self._health = Health(options.directory, clock)
        self._skipped: dict[str, int] = {}
        self._inflight: dict[str, int] = {}
        self._written_by_owner: dict[str, int] = {}
        self._num_written = self._written_bytes = self._num_read = self._read_bytes = 0
        self._num_damaged = self._num_evicted = 0
        self._is_rescanning = self._is_closed = False
        self._read_ahead: tuple[str, ...] = ()
        self._refusal = self._open()
        """Why nothing can be written to the directory as a whole."""

    # --- what can be restored ------------------------------------------------------------------

    def find(self, namespace: str, tokens: NDArray[np.int32], num_held: int = 0) -> Lookup:
        """The longest prefix of `tokens` that can be restored.

        Args:
            namespace: Only entries of the same one are used.
            tokens: The prompt, shape (num_tokens,).
            num_held: Length of the prefix that is in memory already; 0 for an engine that cannot
                cut.
        """
        self._absorb()
        self._look_for_news()
        found = self._index.find(namespace, np.asarray(tokens, np.int32), num_held)
        paths = tuple(segment.path for segment in found.segments)
        if paths and paths != self._read_ahead and files.CAN_READ_AHEAD:
            self._writer.put(lambda: self._writer.read_ahead(paths))
            self._read_ahead = paths
        return found

    def read(self, segment: Segment) -> memoryview | None:
        """The engine's block of a segment, mapped for reading.

        None where it has vanished or its header is damaged; then it is counted, and not found
        again.
        """
        self._absorb()
        try:
            header, block = files.map_entry(segment.path, self._clock())
        except StoreError:
            self.discard(segment)
            return None
        except OSError:
            # Another process evicted it, or the directory is not there any more.
            self._index.remove(segment.key)
            return None
        if not np.array_equal(header.tokens, segment.tokens):
            # A file that claims the hashes of tokens that it does not have.
            self.discard(segment)
            return None
        self._num_read += 1
        self._read_bytes += segment.num_bytes
        return block

    def discard(self, segment: Segment) -> None:
        """Remove a segment that is damaged, and those that continue it."""
        self._absorb()
        removed = self._index.remove(segment.key, is_damaged=True)
        if removed:
            self._num_damaged += 1
            keys = [each.key for each in removed]
            self._writer.put(lambda: self._writer.remove(keys))

    # --- what is kept --------------------------------------------------------------------------

    def stored(self, namespace: str, tokens: NDArray[np.int32]) -> int:
        """Length of the longest prefix of `tokens` that is kept, or on its way to the disk.

        What is missing begins there; 0 where entries are whole and this prefix is not yet one.
        """
        self._absorb()
        return self._stored(namespace, np.asarray(tokens, np.int32))[0]

    def write(
        self,
        namespace: str,
        tokens: NDArray[np.int32],
        start: int,
        export: Callable[[Allocate], object],
    ) -> bool:
        """Keep tokens[start:] of a prefix whose first `start` are kept already.

        Args:
            namespace: Whose it is.
            tokens: The whole prefix, shape (num_tokens,).
            start: Where the segment begins, as `stored` says.
            export: Called with `allocate` at once, on this thread; writes the engine's block into
                the view that allocate(num_bytes) gives.

        Returns:
            False where it was skipped, which is counted by its reason.
        """
        self._absorb()
        tokens = np.asarray(tokens, np.int32)
        parent = self._parent(namespace, tokens, start)
        if isinstance(parent, Skip):
            return self._skip(parent)
        return self._export(namespace, tokens, start, parent, export)

    def must_wait(self, num_bytes: int) -> bool:
        """Whether an entry with a block of about so many bytes had better be written later.

        It would go beyond what may be in flight now; where nothing is, waiting does not help.
        """
        self._absorb()
        return bool(self._inflight) and self._is_beyond_inflight(PAGE_BYTES + num_bytes)

    def stats(self) -> StoreStats:
        """Counters since this store was opened, and what it holds now."""
        self._absorb()
        return StoreStats(
            num_entries=self._index.num_entries,
            entry_bytes=self._index.num_bytes,
            inflight_bytes=sum(self._inflight.values()),
            written_bytes=self._written_bytes,
            written_by_owner=dict(self._written_by_owner),
            written_bytes_today=self._room.bytes_today(self._clock()),
            num_written=self._num_written,
            num_read=self._num_read,
            read_bytes=self._read_bytes,
            num_damaged=self._num_damaged,
            num_evicted=self._num_evicted,
            skipped=dict(self._skipped),
        )

    def flush(self, limit_s: float | None = None) -> None:
        """Wait until everything queued is on the disk, or for so long."""
        self._absorb()
        self._writer.flush(limit_s)
        self._absorb()

    def close(self) -> None:
        """Bring what is queued to the disk and stop; safe to call twice."""
        if not self._is_closed:
            self._is_closed = True
            self._writer.stop(CLOSE_LIMIT_S)
            self._absorb()

    # --- opening -------------------------------------------------------------------------------

    def _open(self) -> Skip | None:
        """Collect what a crash left, keep the bounds, and read the index; or why that failed.

        A directory that can be read alone is read.
        """
        refusal = None
        try:
            self._room.open(self._clock())
        except (OSError, StoreError) as exc:
            refusal = refusal_of(exc)
            self._health.failed(refusal, str(exc))
            self._health.pause()
        if refusal is not Skip.REFUSED:
            self._load()
        self._num_evicted += self._room.num_evicted
        return refusal

    def _load(self) -> None:
        survey = self._room.survey
        changed_ns = changed_at(self._root / self._own)
        for model in survey.models():
            headers = survey.headers(model, list(survey.sizes(model)))
            for header in sorted(headers, key=lambda each: each.start):
                path = str(survey.path(model, header.key))
                if model == self._own:
                    self._index.add(header, path)
                elif self._is_same_model(header):
                    self._index.add_other(header)
        self._num_damaged += survey.num_damaged
        self._writer.saw(changed_ns)

    def _is_same_model(self, header: Header) -> bool:
        model = self._model
        return header.model_name == model.name or bool({*header.model_paths} & {*model.paths})

    # --- writing -------------------------------------------------------------------------------

    def _parent(self, namespace: str, tokens: NDArray[np.int32], start: int) -> Entry | Skip | None:
        """What the segment continues, if anything, or why it is not written."""
        if self._is_closed:
            return Skip.CLOSED
        if not self._health.may_try():
            return Skip.PAUSED if self._refusal is None else self._refusal
        if self._refusal is not None:
            # Once a pause: the answer comes as a message.
            self._health.pause()
            self._writer.put(self._writer.reopen)
            return self._refusal
        if len(tokens) < self._options.min_tokens:
            return Skip.TOO_SHORT
        num_stored, parent = self._stored(namespace, tokens)
        if num_stored == len(tokens):
            return Skip.ALREADY_STORED
        if start == 0:
            return None
        if not self._takes_ranges or parent is None or num_stored < start:
            return Skip.NO_PARENT
        # The last that begins before: an earlier one may go on with another prompt's tokens there.
        return next(each for each in reversed(parent.chain()) if each.segment.start < start)

    def _export(
        self,
        namespace: str,
        tokens: NDArray[np.int32],
        start: int,
        parent: Entry | None,
        export: Callable[[Allocate], object],
    ) -> bool:
        header = self._header(namespace, tokens, start, parent)
        filling = Filling(self._allocate, header)
        try:
            export(filling.allocate)
            temporary, header = filling.finish()
        except (BrimError, OSError, Skipped) as exc:
            filling.remove()
            if isinstance(exc, FileNotFoundError):
                # Somebody removed the directory: later entries find it again.
                self._writer.put(self._writer.reopen)
            return self._skip(why_unfilled(exc), str(exc))
        surplus = [] if self._takes_ranges else self._index.prefixes_of(namespace, tokens)
        self._index.add(header, str(self._room.survey.path(self._own, header.key)), is_pending=True)
        self._inflight[header.key] = temporary.num_bytes
        self._writer.put(lambda: self._writer.write(temporary, header, surplus))
        return True

    def _allocate(self, header: Header) -> files.Temporary:
        """A temporary file for an entry, if the bounds allow it now.

        Raises:
            Skipped: They do not.
            OSError: The disk is full or cannot be written.
        """
        num_bytes, options = header.num_bytes, self._options
        if self._is_beyond_inflight(num_bytes):
            raise Skipped(Skip.IN_FLIGHT)
        if num_bytes > options.budget_bytes:
            raise Skipped(Skip.BUDGET)
        today = self._room.bytes_today(self._clock()) + sum(self._inflight.values())
        if today + num_bytes > options.daily_write_bytes:
            raise Skipped(Skip.DAILY_WRITES)
        if files.free_bytes(self._root) - num_bytes < options.free_disk_floor_bytes:
            # Files are removed on the other thread; the next entry finds the room.
            self._writer.put(lambda: self._writer.make_room(num_bytes))
            raise Skipped(Skip.DISK_FLOOR)
        return files.Temporary(self._root / "tmp", num_bytes, self._clock())

    def _is_beyond_inflight(self, num_bytes: int) -> bool:
        inflight_bytes = sum(self._inflight.values())
        return (
            inflight_bytes + num_bytes > self._options.max_inflight_bytes
            or len(self._inflight) >= MAX_INFLIGHT
        )

    def _stored(self, namespace: str, tokens: NDArray[np.int32]) -> tuple[int, Entry | None]:
        """How much is kept of a prefix; where entries are whole, all of it or nothing."""
        num_tokens, entry = self._index.stored(namespace, tokens)
        if not self._takes_ranges and num_tokens < len(tokens):
            return 0, None
        return num_tokens, entry

    def _header(
        self, namespace: str, tokens: NDArray[np.int32], start: int, parent: Entry | None
    ) -> Header:
        """The header of a segment whose block is not there yet."""
        return Header(
            identity=self._model.identity,
            model_hash=self._model_hash,
            namespace=namespace,
            model_name=self._model.name,
            model_paths=self._model.paths,
            model_bytes=self._model_bytes,
            start=start,
            tokens=tokens[start:].copy(),
            start_hash=prefix_hash(tokens[:start]),
            end_hash=prefix_hash(tokens),
            parent="" if parent is None else parent.segment.key,
            block_bytes=0,
            block_head=b"",
        )

    def _skip(self, reason: Skip, problem: str = "") -> bool:
        self._skipped[reason] = self._skipped.get(reason, 0) + 1
        self._health.failed(reason, problem)
        return False

    # --- the other thread's messages -----------------------------------------------------------

    def _absorb(self) -> None:
        """Take in what the writer's thread did."""
        while self._writer.messages:
            message = self._writer.messages.popleft()
            if isinstance(message, Arrived):
                self._arrived(message)
            elif isinstance(message, Dropped):
                self._inflight.pop(message.key, None)
                if self._index.is_pending(message.key):
                    self._index.remove(message.key)
                self._skip(message.reason, message.problem)
            elif isinstance(message, Changed):
                self._changed(message)
            else:
                self._opened(message)

    def _arrived(self, message: Arrived) -> None:
        self._inflight.pop(message.key, None)
        self._num_written += 1
        self._written_bytes += message.num_bytes
        of_owner = self._written_by_owner.get(message.owner, 0)
        self._written_by_owner[message.owner] = of_owner + message.num_bytes
        self._health.succeeded()
        if not self._index.set_on_disk(message.key):
            self._rescan()

    def _changed(self, message: Changed) -> None:
        self._num_evicted += message.num_evicted
        self._num_damaged += message.num_damaged
        self._is_rescanning &= not message.is_rescan
        for key in message.gone:
            if not self._index.is_pending(key):
                self._index.remove(key)
        for header in message.found:
            self._index.add(header, str(self._room.survey.path(self._own, header.key)))

    def _opened(self, message: Opened) -> None:
        self._refusal = message.reason
        if message.reason is None:
            self._health.succeeded()
        else:
            self._health.failed(message.reason, message.problem)

    def _look_for_news(self) -> None:
        if self._refusal is None and not self._is_rescanning and self._writer.has_news():
            self._rescan()

    def _rescan(self) -> None:
        self._is_rescanning = True
        known = frozenset(self._index.keys())
        self._writer.put(lambda: self._writer.rescan(known))
