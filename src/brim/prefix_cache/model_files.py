"""What a model's files are, so that KV of a file that was replaced is never taken for this one's.

An engine's identity comes from a model's header and size; two fine-tunes of one model may share
both.  Size, time of change and samples of the contents tell them apart without reading gigabytes.
"""

import hashlib
import os
from collections.abc import Sequence

NUM_SAMPLES = 64
"""Spread over a file: of training that changed one layer in 30, two of them see it."""

SAMPLE_BYTES = 4096
"""A block of every file system; 64 of them are read in some milliseconds from any SSD."""


def model_hash(paths: Sequence[str]) -> bytes:
    """SHA-256 over sizes, times of change and samples of files; missing ones count as empty."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - unbuffered: samples only
                status = os.fstat(file.fileno())
                digest.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
                step = max(SAMPLE_BYTES, status.st_size // NUM_SAMPLES)
                for start in range(0, status.st_size, step):
                    digest.update(os.pread(file.fileno(), SAMPLE_BYTES, start))
        except OSError:
            digest.update(b"missing\n")
    return digest.digest()


def model_bytes(paths: Sequence[str]) -> int:
    """Bytes of the files that are there."""
    total = 0
    for path in paths:
        try:
            total += os.stat(path).st_size  # noqa: PTH116 - a str, as the plan has it
        except OSError:
            continue
    return total
