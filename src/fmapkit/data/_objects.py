"""Objects of a store, for which Zarr has no call: those that are no arrays, and what the disk has.

What a store does, it does in the event loop of Zarr.
"""

from __future__ import annotations

import errno
import os
from asyncio import gather
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_READ = 64  # objects at once
_FLUSHED = 8  # files at once: it takes the disk one wait for several
# Of a file system that does not know how to; anything else is a failure of the disk.
_UNKNOWN = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


def put(store: Any, path: str, content: bytes) -> None:
    from zarr.buffer.cpu import Buffer
    from zarr.core.sync import sync

    sync(store.set(path, Buffer.from_bytes(content)))


def read(store: Any, path: str) -> list[bytes]:
    """What is in the objects below a path whose names are numbers."""
    from zarr.core.sync import sync

    return sync(_read(store, path))


async def _read(store: Any, path: str) -> list[bytes]:
    from zarr.buffer import default_buffer_prototype

    prototype = default_buffer_prototype()
    names = [name async for name in store.list_dir(path) if name.isdecimal()]
    found = []
    for first in range(0, len(names), _READ):
        some = names[first : first + _READ]
        found += await gather(*(store.get(f"{path}/{name}", prototype) for name in some))
    return [buffer.to_bytes() for buffer in found if buffer is not None]


def flush(paths: Iterable[Path]) -> None:
    """Return once the disk has all files at and below some paths.

    The folders that name them are not flushed by themselves: ext4, XFS and Btrfs write a new name
    with the file that has it, and each folder would cost a wait of its own.

    Raises:
        OSError: it cannot be written after all: the disk is full, or broken.
    """
    files: list[Path] = []
    for path in paths:
        files += [f for f in path.rglob("*") if f.is_file()] if path.is_dir() else [path]
    if len(files) == 1:
        _flush(files[0])
    elif files:
        with ThreadPoolExecutor(min(_FLUSHED, len(files))) as pool:
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
