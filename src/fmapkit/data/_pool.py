"""The rows in a buffer, and the order in which they will be given.

`Slots` has them in memory of its own, `Views` where they are: in files that are mapped.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

__all__ = ["NO_ROWS", "Pool", "Slots", "Views"]

NO_ROWS = torch.empty(0, 2, dtype=torch.int64)
_Array = np.ndarray[Any, Any]


class Pool(Protocol):
    """Rows in an order."""

    def __len__(self) -> int: ...

    @property
    def ids(self) -> Tensor:
        """Number of block, and row in it, of all rows in order: (rows, 2)."""

    def reorder(self, order: Tensor) -> None:
        """Put the rows into another order."""

    def pop(self, count: int) -> dict[str, Tensor]:
        """The next rows."""

    def add(self, number: int, rows: dict[str, Tensor], capacity: int) -> None:
        """Take a block in; the first time, room for so many rows and one block is made."""


class Views:
    """Blocks whose memory is a file's: rows are copied once, into the batch.

    In a batch, the rows of one block stand together, so that each block is read once.

    Args:
        ids: of the rows to begin with, in order.
        block: gives a block by its number.
    """

    def __init__(self, ids: Tensor, block: Callable[[int], dict[str, Tensor]]) -> None:
        self._ids = ids.numpy().copy()
        self._like: dict[str, Tensor] = {}
        self._blocks: dict[int, list[_Array]] = {}
        for number in np.unique(self._ids[:, 0]).tolist():
            self._keep(number, block(number))

    def _keep(self, number: int, rows: dict[str, Tensor]) -> None:
        self._like = rows
        self._blocks[number] = [_bits(values) for values in rows.values()]

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def ids(self) -> Tensor:
        """Number of block, and row in it, of all rows in order."""
        return torch.from_numpy(self._ids.copy())

    def reorder(self, order: Tensor) -> None:
        """Put the rows into another order."""
        self._ids = self._ids[order.numpy()]

    def add(self, number: int, rows: dict[str, Tensor], capacity: int) -> None:
        """Take a block in, and let those go of which no row is left."""
        count = len(next(iter(rows.values())))
        new = np.stack([np.full(count, number), np.arange(count)], 1)
        used = set(np.unique(self._ids[:, 0]).tolist())
        self._blocks = {n: block for n, block in self._blocks.items() if n in used}
        self._keep(number, rows)
        self._ids = np.concatenate([self._ids, new])

    def pop(self, count: int) -> dict[str, Tensor]:
        """The next rows."""
        ids, self._ids = self._ids[:count], self._ids[count:]
        ids = ids[np.argsort(ids[:, 0], kind="stable")]
        numbers, rows = ids[:, 0].tolist(), np.ascontiguousarray(ids[:, 1])
        cuts = [0, *(np.flatnonzero(np.diff(ids[:, 0])) + 1).tolist(), count]
        found = {n: v.new_empty((count, *v.shape[1:])) for n, v in self._like.items()}
        outs = [_bits(values) for values in found.values()]
        for first, last in itertools.pairwise(cuts):
            for block, out in zip(self._blocks[numbers[first]], outs, strict=True):
                block.take(rows[first:last], 0, out[first:last], "clip")
        return found


class Slots:
    """Rows in slots that are used again, and the order in which they will be given.

    Args:
        rows: to begin with, in order.
        ids: of these: number of block and row in it.
    """

    def __init__(self, rows: dict[str, Tensor], ids: Tensor) -> None:
        self._rows = rows
        self._size = len(ids)  # slots
        self._ids = ids.numpy().copy()  # of each slot
        self._order = np.arange(len(ids))  # slots, as they will be given
        self._free = np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self._order)

    @property
    def ids(self) -> Tensor:
        """Of all rows, in order."""
        return torch.from_numpy(self._ids[self._order])

    def reorder(self, order: Tensor) -> None:
        """Put the rows into another order."""
        self._order = self._order[order.numpy()]

    def pop(self, count: int) -> dict[str, Tensor]:
        """The next rows."""
        slots, self._order = self._order[:count], self._order[count:]
        self._free = np.concatenate([self._free, slots])
        return {name: _gathered(rows, slots) for name, rows in self._rows.items()}

    def add(self, number: int, rows: dict[str, Tensor], capacity: int) -> None:
        """Take a block in; the first time, room for so many rows and one block is made."""
        count = len(next(iter(rows.values())))
        if len(self._free) < count:
            least = self._size - len(self._free) + count
            self._grow(rows, max(least, capacity + count if not self._size else 0))
        slots, self._free = self._free[:count], self._free[count:]
        for name, values in rows.items():
            _scattered(self._rows[name], slots, values)
        self._ids[slots, 0] = number
        self._ids[slots, 1] = np.arange(count)
        self._order = np.concatenate([self._order, slots])

    def _grow(self, like: dict[str, Tensor], least: int) -> None:
        """Room for more: half as many again, so that growing is rare."""
        size = max(least, self._size + self._size // 2)
        for name, values in like.items():
            wider = values.new_empty((size, *values.shape[1:]))
            if self._size:
                wider[: self._size] = self._rows[name]
            self._rows[name] = wider
        ids = np.zeros((size, 2), np.int64)
        ids[: self._size] = self._ids
        self._free = np.concatenate([self._free, np.arange(self._size, size)])
        self._ids, self._size = ids, size


def _bits(rows: Tensor) -> np.ndarray[Any, Any]:
    """The memory of a CPU tensor, as NumPy has it: it moves rows several times as fast."""
    if rows.dtype == torch.bfloat16 or (rows.is_floating_point() and rows.element_size() == 1):
        rows = rows.view({1: torch.uint8, 2: torch.int16}[rows.element_size()])
    return rows.numpy()


def _gathered(rows: Tensor, slots: np.ndarray[Any, Any]) -> Tensor:
    if rows.device.type != "cpu":
        return rows.index_select(0, torch.from_numpy(slots).to(rows.device))
    found = torch.from_numpy(_bits(rows)[slots])
    return found if found.dtype == rows.dtype else found.view(rows.dtype)


def _scattered(rows: Tensor, slots: np.ndarray[Any, Any], values: Tensor) -> None:
    if rows.device.type != "cpu":
        rows.index_copy_(0, torch.from_numpy(slots).to(rows.device), values)
        return
    _bits(rows)[slots] = _bits(values)
