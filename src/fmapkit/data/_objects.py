"""Objects of a Zarr store that are no arrays: put there and read, in the event loop of Zarr."""

from __future__ import annotations

from asyncio import gather
from typing import Any

__all__ = ["put", "read"]

_AT_ONCE = 64  # of them that are read


def put(store: Any, path: str, content: bytes) -> None:
    """Write an object."""
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
    for first in range(0, len(names), _AT_ONCE):
        some = names[first : first + _AT_ONCE]
        found += await gather(*(store.get(f"{path}/{name}", prototype) for name in some))
    return [buffer.to_bytes() for buffer in found if buffer is not None]
