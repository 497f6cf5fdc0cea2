"""Reading rows of an array that lies in pieces: one a unit, or one for many.

Where the store is a folder and nothing is compressed, a unit's file is mapped into memory: rows are
read as from a `.npy` file that is mapped, without a detour through Zarr. Rows in any order are
gathered from all files at once. Else Zarr reads.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from fmapkit.data._joined import Joined, join

NdArray = np.ndarray[Any, Any]
File = tuple[Path, int]  # and how many rows it has
_OPEN = 128  # files that are mapped at once, each by itself


@dataclass(frozen=True, eq=False)
class Piece:
    """The rows of a unit: read from a map of its file, where that can be, else through Zarr."""

    array: Callable[[], Any]  # opens the Zarr array; is asked several times
    first: int  # number of its first row in that array
    rows: int  # how many there are: the first of an object
    file: File | None  # that object, if it is a file of this machine

    def is_plain(self) -> bool:
        """Whether its file holds nothing but rows, as they lie in memory."""
        if self.file is None:
            return False
        from zarr.codecs import BytesCodec

        array = self.array()
        codecs, dtype = array.metadata.codecs, np.dtype(array.dtype)
        if len(codecs) != 1 or not isinstance(codecs[0], BytesCodec) or dtype.hasobject:
            return False
        endian = codecs[0].endian  # a member of an enum before zarr 3.4, then its text
        little = getattr(endian, "value", endian) == "little" or dtype.itemsize == 1
        return little and tuple(array.chunks[1:]) == tuple(array.shape[1:])

    @cached_property
    def _mapped(self) -> Callable[[], NdArray] | None:
        """What maps its file, where rows lie in it as in memory; else None."""
        if self.file is None or not self.is_plain():
            return None
        path, rows, array = self.file[0], self.rows, self.array()
        shape, dtype = tuple(array.chunks), np.dtype(array.dtype)
        there = path.stat()
        if there.st_size != int(np.prod(shape, dtype=np.int64)) * dtype.itemsize:
            return None
        which = (there.st_ino, there.st_mtime_ns)
        return lambda: _map(str(path), dtype.newbyteorder("<").str, shape, which)[:rows]

    def _opened(self) -> tuple[Any, int]:
        """What the rows lie in, which slices as NumPy does, and the number of the first one."""
        return (self._mapped(), 0) if self._mapped is not None else (self.array(), self.first)

    def read(self, first: int, last: int, rest: tuple[Any, ...]) -> NdArray:
        """The rows from `first` to before `last`, cut by `rest` along the other axes."""
        source, start = self._opened()
        key = (slice(start + first, start + last), *rest)
        return np.asarray(source[key])

    def take(self, rows: NdArray, rest: tuple[Any, ...]) -> NdArray:
        source, start = self._opened()
        cut = (slice(None), *rest)
        if isinstance(source, np.ndarray):
            return np.asarray(source[rows][cut])
        # Zarr reads each chunk once where the rows are in order.
        unique, back = np.unique(rows, return_inverse=True)
        key = (unique + start, *[slice(None)] * (source.ndim - 1))
        return np.asarray(source.oindex[key][back][cut])


class Pieces:
    """An array of rows."""

    def __init__(
        self, pieces: Sequence[Piece], shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> None:
        self._pieces = [piece for piece in pieces if piece.rows]
        ends = np.cumsum([0] + [piece.rows for piece in self._pieces])
        self._ends: list[int] = ends.tolist()
        self._shape = shape
        self._dtype = dtype

    def __len__(self) -> int:
        return self._ends[-1]

    @cached_property
    def joined(self) -> Joined | None:
        """The files of all pieces, mapped as one array; None where that cannot be."""
        files = [piece.file for piece in self._pieces if piece.file]
        if not files or len(files) < len(self._pieces) or not self._pieces[0].is_plain():
            return None
        return join(files, self._shape, self._dtype)

    @cached_property
    def _gaps(self) -> NdArray | None:
        """How much farther on the rows of each piece are, where these are joined; None for 0."""
        assert self.joined is not None
        gaps: NdArray = self.joined.starts - np.asarray(self._ends[:-1])
        return gaps if gaps.any() else None

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """First row and row after the last, of each piece."""
        return list(zip(self._ends[:-1], self._ends[1:], strict=True))

    def read(self, first: int, last: int, rest: tuple[Any, ...] = ()) -> NdArray:
        """The rows from `first` to before `last`, cut by `rest` along the other axes; a copy."""
        out = self._empty(max(0, last - first), rest)
        at = bisect_right(self._ends, first) - 1
        row = first
        while row < last:
            start, end = self._ends[at], min(last, self._ends[at + 1])
            piece = self._pieces[at].read(row - start, end - start, rest)
            if end - row == len(out) and piece.base is None and piece.flags.owndata:
                return piece  # all of it, and nobody else's
            out[row - first : end - first] = piece
            row, at = end, at + 1
        return out

    def view(self, first: int, last: int) -> NdArray:
        """The same of rows that are all in one piece, without a copy where it is mapped."""
        at = bisect_right(self._ends, first) - 1
        if first == last or last > self._ends[at + 1]:
            return self.read(first, last)
        if self.joined is not None:
            gap = 0 if self._gaps is None else self._gaps[at]
            return self.joined.rows[first + gap : last + gap]
        start = self._ends[at]
        return self._pieces[at].read(first - start, last - start, ())

    def take(self, rows: NdArray, rest: tuple[Any, ...] = ()) -> NdArray:
        """Rows by number (int64), in any order, as often as given; a copy, cut as by `read`."""
        if self.joined is not None:
            if self._gaps is not None:
                rows = rows + self._gaps[np.searchsorted(self._ends, rows, side="right") - 1]
            # Clipping is not needed, and the quickest.
            found = self.joined.rows.take(rows, 0, None, "clip")
            cut = (slice(None), *rest)
            return np.ascontiguousarray(found[cut]) if rest else found
        out = self._empty(len(rows), rest)
        which = np.searchsorted(self._ends, rows, side="right") - 1
        order = np.argsort(which, kind="stable")
        cuts = np.flatnonzero(np.diff(which[order])) + 1
        for group in np.split(order, cuts) if len(rows) else ():
            at = which[group[0]]
            out[group] = self._pieces[at].take(rows[group] - self._ends[at], rest)
        return out

    def _empty(self, rows: int, rest: tuple[Any, ...]) -> NdArray:
        cut = np.broadcast_to(np.zeros((), np.uint8), self._shape)[rest]
        return np.empty((rows, *np.shape(cut)), self._dtype)


def chunk_name(shard: int, axes: int) -> str:
    """The name of an object of an array: which one along the rows, the only one along others."""
    return ".".join(("c", str(shard), *["0"] * axes))


@lru_cache(maxsize=_OPEN)
def _map(path: str, dtype: str, shape: tuple[int, ...], which: tuple[int, int]) -> NdArray:
    # Copied on write: what torch may make of it never gets to the file.
    return np.memmap(path, dtype, "c", shape=shape).view(np.ndarray)
