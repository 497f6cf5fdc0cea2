"""Reading rows of an array that lies in pieces: one a unit, or one for many.

Where the store is a folder and nothing is compressed, rows are read as from a `.npy` file that is
mapped, without a detour through Zarr: all files are mapped as one array, or where that cannot be,
each while it is read. Else Zarr reads.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fmapkit.data._joined import Joined, join

NdArray = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Piece:
    """The rows of a unit.

    Attributes:
        array: opens the Zarr array; is asked several times.
        first: number of the unit's first row in that array.
        rows: how many there are.
        file: the object with them, and how many rows it has room for, if it is a file of this
            machine; else None.
    """

    array: Callable[[], Any]
    first: int
    rows: int
    file: tuple[Path, int] | None


class Pieces:
    """An array of rows."""

    def __init__(self, pieces: Sequence[Piece], shape: tuple[int, ...], dtype: Any) -> None:
        self._pieces = [piece for piece in pieces if piece.rows]
        ends = np.cumsum([0] + [piece.rows for piece in self._pieces])
        self._ends: list[int] = ends.tolist()
        self._shape = shape
        self._dtype = dtype

    def __len__(self) -> int:
        return self._ends[-1]

    @cached_property
    def _plain(self) -> bool:
        """Whether each piece is a file of nothing but rows, on this machine."""
        there = all(piece.file for piece in self._pieces)
        return bool(self._pieces) and there and is_plain(self._pieces[0].array())

    @cached_property
    def joined(self) -> Joined | None:
        """The files of all pieces, mapped as one array; None where that cannot be."""
        files = [piece.file for piece in self._pieces if piece.file]
        return join(files, self._shape, np.dtype(self._dtype)) if self._plain else None

    def _source(self, at: int) -> tuple[Any, int]:
        """What a piece's rows lie in, which slices as NumPy does, and the number of the first."""
        if self.joined is not None:
            return self.joined.rows, int(self.joined.starts[at])
        piece = self._pieces[at]
        if self._plain and piece.file:
            path, room = piece.file
            shape, dtype = (room, *self._shape), np.dtype(self._dtype).newbyteorder("<")
            if path.stat().st_size == math.prod(shape) * dtype.itemsize:
                # Copied on write: what torch may make of it never gets to the file.
                return np.memmap(path, dtype, "c", shape=shape).view(np.ndarray), 0
        return piece.array(), piece.first

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
            source, zero = self._source(at)
            key = (slice(zero + row - start, zero + end - start), *rest)
            piece = np.asarray(source[key])
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
        source, zero = self._source(at)
        start = self._ends[at]
        return np.asarray(source[zero + first - start : zero + last - start])

    def take(self, rows: NdArray, rest: tuple[Any, ...] = ()) -> NdArray:
        """Some rows, in any order, each as often as it is given; a copy.

        Args:
            rows: int64, from 0 to before the number of rows.
            rest: as in `read`.
        """
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
            source, zero = self._source(at)
            here, cut = rows[group] - self._ends[at] + zero, (slice(None), *rest)
            if isinstance(source, np.ndarray):
                out[group] = source[here][cut]
            else:  # Zarr reads each chunk once where the rows are in order
                unique, back = np.unique(here, return_inverse=True)
                key = (unique, *[slice(None)] * len(self._shape))
                out[group] = source.oindex[key][back][cut]
        return out

    def _empty(self, rows: int, rest: tuple[Any, ...]) -> NdArray:
        cut = np.broadcast_to(np.zeros((), np.uint8), self._shape)[rest]
        return np.empty((rows, *np.shape(cut)), self._dtype)


def chunk_name(shard: int, axes: int) -> str:
    """The name of an object of an array: which one along the rows, the only one along others."""
    return ".".join(("c", str(shard), *["0"] * axes))


def is_plain(array: Any) -> bool:
    """Whether a chunk of a Zarr array is a file of nothing but rows, as they lie in memory."""
    from zarr.codecs import BytesCodec

    codecs, dtype = array.metadata.codecs, np.dtype(array.dtype)
    if len(codecs) != 1 or not isinstance(codecs[0], BytesCodec) or dtype.hasobject:
        return False
    endian = codecs[0].endian  # a member of an enum before zarr 3.4, then its text
    little = getattr(endian, "value", endian) == "little" or dtype.itemsize == 1
    return little and tuple(array.chunks[1:]) == tuple(array.shape[1:])
