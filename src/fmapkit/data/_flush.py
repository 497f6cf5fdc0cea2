"""Have the disk write what it was given."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

__all__ = ["flush"]

_AT_ONCE = 8  # files that the disk is asked to keep; it takes one wait for several
# Of a file system that does not know how to; anything else is a failure of the disk.
_UNKNOWN = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


def flush(paths: Iterable[Path]) -> None:
    """Return once the disk has all files at and below some paths.

    The folders that name them are not flushed by themselves: ext4, XFS and Btrfs write a new name
    with the file that has it, and each folder would cost a wait of its own.

    Args:
        paths: files and folders.

    Raises:
        OSError: it cannot be written after all: the disk is full, or broken.
    """
    files = [file for path in paths for file in _below(path)]
    if len(files) == 1:
        _flush(files[0])
    elif files:
        with ThreadPoolExecutor(min(_AT_ONCE, len(files))) as pool:
            list(pool.map(_flush, files))


def _flush(file: Path) -> None:
    # Windows flushes what is open for writing only.
    handle = os.open(file, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _UNKNOWN:
            raise
    finally:
        os.close(handle)


def _below(path: Path) -> Iterator[Path]:
    if path.is_dir():
        yield from (inner for inner in path.rglob("*") if inner.is_file())
    else:
        yield path
