"""Gives a file its blocks before it is mapped and written."""

import errno
import os

_ZEROS = bytes(1024 * 1024)

_CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
"""What file systems without posix_fallocate answer (ZFS, NFS)."""


def reserve_blocks(descriptor: int, num_bytes: int) -> None:
    """Give a file its length and its blocks now: writing into a hole of a full disk is a SIGBUS.

    Raises:
        OSError: There is no room.
    """
    os.truncate(descriptor, num_bytes)
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, num_bytes)
        except OSError as exc:
            if exc.errno not in _CANNOT_RESERVE:
                raise
        else:
            return
    for start in range(0, num_bytes, len(_ZEROS)):
        os.pwrite(descriptor, _ZEROS[: num_bytes - start], start)
