"""Reads a model's files into the page cache piece by piece, so that somebody can say how far it is.

llama.cpp maps them with MAP_POPULATE, one call that returns when everything is in memory; and macOS
reads a page when it is first computed with, which would make the first token the slow one.
"""

import mmap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

PIECE_BYTES = 16 * 1024 * 1024
"""A slow disk takes a tenth of a second for it, which is how often progress is told."""

MADV_POPULATE_READ = 22
"""Linux from 5.14 on: read a range in, without copying it.  Source: linux/mman.h."""


def read_in(paths: Sequence[str], on_progress: Callable[[float], None]) -> None:
    """Have the files' pages in memory, as far as there is room.

    A file that cannot be read is left to whoever loads it, and says what is wrong.

    Args:
        paths: The files.
        on_progress: Called after each piece with the share of all bytes that is done.
    """
    files = [Path(path) for path in paths]
    try:
        total = sum(file.stat().st_size for file in files)
        done = 0
        for file in files:
            for num_bytes in _pieces(file):
                done += num_bytes
                on_progress(min(1.0, done / total))
    except (OSError, ValueError):  # an empty file cannot be mapped
        return


def _pieces(path: Path) -> Iterator[int]:
    """Read a file in; the bytes of each piece."""
    with (
        path.open("rb", buffering=0) as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping,
    ):
        # Where the call is not there, a copy to nowhere does it.
        buffer: bytearray | None = None
        for start in range(0, len(mapping), PIECE_BYTES):
            num_bytes = min(PIECE_BYTES, len(mapping) - start)
            if buffer is None:
                try:
                    mapping.madvise(MADV_POPULATE_READ, start, num_bytes)
                except (OSError, AttributeError):
                    buffer = bytearray(PIECE_BYTES)
            if buffer is not None:
                file.seek(start)
                file.readinto(memoryview(buffer)[:num_bytes])
            yield num_bytes
