"""Have the disk write what it was given."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

__all__ = ["flush"]

# Of a file system that does not know how to; anything else is a failure of the disk.
_UNKNOWN = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


def flush(paths: Iterable[Path]) -> None:
    """Return once the disk has all files at and below some paths.

    The folders that name them are not flushed by themselves: ext4, XFS and Btrfs write a new name
    with the file that has it, and each folder would cost a wait of its own.

    Args:
        paths: files, folders, or nothing.

    Raises:
        OSError: it cannot be written after all: the disk is full, or broken.
    """
    for path in paths:
        for file in _files(path):
            # Windows flushes what is open for writing only.
            handle = os.open(file, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
            try:
                os.fsync(handle)
            except OSError as error:
                if error.errno not in _UNKNOWN:
                    raise
            finally:
                os.close(handle)


def _files(path: Path) -> Iterator[Path]:
    if path.is_dir():
        yield from (inner for inner in path.rglob("*") if inner.is_file())
    elif path.exists():
        yield path
