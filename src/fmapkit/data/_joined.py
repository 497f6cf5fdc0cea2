"""Files of rows as one array: mapped into memory, each at its place in one range of addresses.

`numpy.memmap` maps one file. A store has a file a unit, and the rows of a shuffled batch lie in
most of them: gathered file by file, half of the time goes into the steps in between. So a range of
addresses is reserved, the files are mapped into it one behind the other (`mmap` with `MAP_FIXED`,
which overlays what was reserved), and NumPy sees one array, which one `take` gathers from.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

NdArray = np.ndarray[Any, Any]

_FIXED = 0x10  # MAP_FIXED on Linux and macOS; Python does not name it
_FILES = 2**14  # mapped at once; with what lies between them, half of the maps that Linux allows
_ADDRESSES = 2**45  # bytes of them for one array: a quarter of what a process has


@dataclass(frozen=True, slots=True, eq=False)
class Joined:
    """Rows of files as one array."""

    rows: NdArray  # all of them, and what lies between the files, which nobody must read
    starts: NdArray  # where in `rows` the first row of each file is


def join(
    files: Sequence[tuple[Path, int]], shape: tuple[int, ...], dtype: np.dtype[Any]
) -> Joined | None:
    """Map files of nothing but so many rows; None where the system cannot, or one is not so.

    Each file begins at the next page that is a whole number of rows after the first one.
    """
    libc = _libc()
    row = math.prod(shape) * dtype.itemsize
    if libc is None or not files or not row or dtype.hasobject:
        return None
    step = math.lcm(mmap.PAGESIZE, row)
    sizes = [rows * row for _, rows in files]
    places = np.cumsum([0] + [-(-size // step) * step for size in sizes])
    total = int(places[-1])
    if total > _ADDRESSES or not _budget.take(len(files)):
        return None
    try:
        memory = _Memory(libc, total, (total // row, *shape), dtype)
        for (path, _), size, place in zip(files, sizes, places[:-1].tolist(), strict=True):
            memory.map(path, size, place)
    except OSError:
        _budget.give(len(files))
        return None
    weakref.finalize(memory, _budget.give, len(files)).atexit = False
    return Joined(np.asarray(memory), places[:-1] // row)


class _Memory:
    """A range of addresses, given back once no array uses it; an `OSError` if there are none."""

    def __init__(self, libc: Any, size: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._libc = libc
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._address: int = _checked(libc.mmap(None, size, 0, flags, -1, 0))
        # At exit other threads may still read.
        weakref.finalize(self, libc.munmap, self._address, size).atexit = False
        self.__array_interface__ = {
            "version": 3,
            "shape": shape,
            "typestr": dtype.str,
            "data": (self._address, False),
        }

    def map(self, path: Path, size: int, place: int) -> None:
        """Map a file of that size at its place, or raise an `OSError`.

        What is written to the memory never gets to the file.
        """
        file = os.open(path, os.O_RDONLY)
        try:
            if os.fstat(file).st_size != size:
                raise OSError(f"{path} has {os.fstat(file).st_size} bytes, not {size}")
            access = mmap.PROT_READ | mmap.PROT_WRITE
            flags = mmap.MAP_PRIVATE | _FIXED
            _checked(self._libc.mmap(self._address + place, size, access, flags, file, 0))
        finally:
            os.close(file)


class _Budget:
    """How many files are mapped."""

    def __init__(self, most: int) -> None:
        self._left = most
        self._lock = threading.RLock()  # a finalizer may run while this thread holds it

    def take(self, count: int) -> bool:
        """Whether so many more may be."""
        with self._lock:
            enough = count <= self._left
            self._left -= count if enough else 0
            return enough

    def give(self, count: int) -> None:
        """So many are not any more."""
        with self._lock:
            self._left += count


_budget = _Budget(_FILES)


@cache
def _libc() -> Any:
    """The system's C library, where it is known to do this; else None."""
    if sys.platform not in ("linux", "darwin") or sys.maxsize < 2**32:
        return None
    if sys.byteorder != "little":  # as the files are
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    size, flag = ctypes.c_size_t, ctypes.c_int
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, size, flag, flag, flag, ctypes.c_long)
    libc.munmap.argtypes = (ctypes.c_void_p, size)
    return libc


def _checked(address: int | None) -> int:
    if address is None or address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return address
