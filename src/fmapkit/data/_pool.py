"""The rows in a buffer, and the order in which they will be given.

`Slots` has them in memory of its own, `Views` where they are: in files that are mapped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmapkit.data._manifest import as_stored

NO_ROWS = torch.empty(0, 2, dtype=torch.int64)
_Array = np.ndarray[Any, Any]


class Views:
    """Rows whose memory is a store's: each is copied once, into its batch."""

    def __init__(
        self, ids: Tensor, starts: _Array, gather: Callable[[_Array], dict[str, Tensor]]
    ) -> None:
        self._starts = starts  # number of each block's first row
        self._gather = gather  # gives rows by their numbers
        self._rows: _Array = starts[ids[:, 0].numpy()] + ids[:, 1].numpy()

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def ids(self) -> Tensor:
        """Number of block, and row in it, of all rows in order."""
        blocks = np.searchsorted(self._starts, self._rows, side="right") - 1
        return torch.from_numpy(np.stack([blocks, self._rows - self._starts[blocks]], 1))

    def reorder(self, order: Tensor) -> None:
        """Put the rows into another order."""
        self._rows = self._rows[order.numpy()]

    def pop(self, count: int) -> dict[str, Tensor]:
        """The next rows."""
        rows, self._rows = self._rows[:count], self._rows[count:]
        return self._gather(rows)

    def add(self, number: int, rows: dict[str, Tensor], capacity: int) -> None:
        """Take a block in."""
        first = self._starts[number]
        new = np.arange(first, first + len(next(iter(rows.values()))))
        self._rows = np.concatenate([self._rows, new])


class Slots:
    """Rows in slots that are used again, and the order in which they will be given."""

    def __init__(self, rows: dict[str, Tensor], ids: Tensor) -> None:
        self._rows = rows  # to begin with, in order
        self._size = len(ids)  # slots
        self._ids = ids.numpy().copy()  # of each slot: number of block and row in it
        self._order = np.arange(len(ids))  # slots, as they will be given
        self._free = np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self._order)

    @property
    def ids(self) -> Tensor:
        return torch.from_numpy(self._ids[self._order])

    def reorder(self, order: Tensor) -> None:
        self._order = self._order[order.numpy()]

    def pop(self, count: int) -> dict[str, Tensor]:
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


Pool = Slots | Views


def _gathered(rows: Tensor, slots: np.ndarray[Any, Any]) -> Tensor:
    if rows.device.type != "cpu":
        return rows.index_select(0, torch.from_numpy(slots).to(rows.device))
    found = torch.from_numpy(as_stored(rows)[slots])
    return found if found.dtype == rows.dtype else found.view(rows.dtype)


def _scattered(rows: Tensor, slots: np.ndarray[Any, Any], values: Tensor) -> None:
    if rows.device.type != "cpu":
        rows.index_copy_(0, torch.from_numpy(slots).to(rows.device), values)
        return
    as_stored(rows)[slots] = as_stored(values)
