"""Arrays of a store: rows that are read when they are asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmapkit._lazy import needed
from fmapkit.data._manifest import ArraySpec, torch_dtype
from fmapkit.data._pieces import Pieces
from fmapkit.errors import ArgumentError
from fmapkit.torchlib.memory import as_numpy

_BLOCK = 2**24  # bytes that are read at once where all are wanted


class StoredArray:
    """Rows of numbers (or of text) in a store; indexing reads them.

    `array[i]`, `array[a:b]`, `array[[3, 1, 4]]`, `array[mask]` give torch tensors, of text NumPy
    arrays; further indices cut the other axes, as in `array[:100, 5]`, by place: where some filters
    alone are there, `FeatureArray.filters` says which is where.

    Args:
        name: of it.
        pieces: its rows.
        shape: of a row.
        dtype: torch's or NumPy's name of the type; "string" for text.
    """

    def __init__(self, name: str, pieces: Pieces, shape: tuple[int, ...], dtype: str) -> None:
        self.name = name
        self._pieces = pieces
        self._row = shape
        #: The values' torch type; None for text.
        self.dtype: torch.dtype | None = None if dtype == "string" else torch_dtype(dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows, and the shape of each."""
        return (len(self._pieces), *self._row)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return 1 + len(self._row)

    @property
    def nbytes(self) -> int:
        """Bytes of all values, before compression; of text 0."""
        return 0 if self.dtype is None else prod(self.shape) * self.dtype.itemsize

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, key: Any) -> Any:
        """Some rows, read now.

        Raises:
            IndexError: a row is out of range.
            ArgumentError: that is no index of rows.
        """
        rows, *others = key if isinstance(key, tuple) else (key,)
        rest = tuple(others)
        if rows is Ellipsis or any(r is Ellipsis or r is None for r in rest):
            raise ArgumentError(f"the first index of {self!r} is of rows, and ... is none")
        if isinstance(rows, (int, np.integer)) and not isinstance(rows, bool):
            row = self._inside(int(rows))
            return self._given(self._pieces.read(row, row + 1, rest))[0]
        if isinstance(rows, slice):
            first, last, step = rows.indices(len(self))
            if step == 1:
                return self._given(self._pieces.read(first, max(first, last), rest))
            return self._given(self._pieces.take(np.arange(first, last, step), rest))
        picked = np.asarray(rows.cpu() if isinstance(rows, Tensor) else rows)
        if picked.dtype == bool:
            if picked.shape != (len(self),):
                raise IndexError(f"a mask of shape {picked.shape} for {len(self)} rows")
            picked = np.flatnonzero(picked)
        if picked.ndim != 1 or (picked.size and picked.dtype.kind not in "iu"):
            raise ArgumentError(
                f"rows are given by an int, a slice, ints, or a mask, not by {rows!r}"
            )
        picked = picked.astype(np.int64, copy=False)
        if picked.size:
            for end in (picked.min(), picked.max()):
                self._inside(int(end))
            picked = picked % len(self)
        return self._given(self._pieces.take(picked, rest))

    def _inside(self, row: int) -> int:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} is out of range: {self!r} has {len(self)}")
        return row % len(self)

    def gather(self, rows: np.ndarray[Any, Any]) -> Tensor:
        """The same as `array[rows]`, without a look at the numbers: int64, from 0."""
        found: Tensor = self._given(self._pieces.take(rows))
        return found

    def _given(self, values: np.ndarray[Any, Any]) -> Any:
        """Stored values as the user gets them."""
        if self.dtype is None:
            return values
        found = torch.from_numpy(values if values.flags.writeable else values.copy())
        return found if found.dtype == self.dtype else found.view(self.dtype)

    def view(self, first: int, last: int) -> Tensor:
        """The rows from `first` to before `last`, of one unit: the store's own memory if it can be.

        Clone it before you write to it.
        """
        found: Tensor = self._given(self._pieces.view(first, last))
        return found

    @property
    def mapped(self) -> bool:
        """Whether `view` gives the store's own memory, and `gather` reads from it."""
        return self._pieces.joined is not None

    def blocks(self) -> Iterator[Any]:
        """All rows, some MiB at a time."""
        size = max(1, _BLOCK // max(1, self.nbytes // max(1, len(self)) or 64))
        for first in range(0, len(self), size):
            yield self[first : first + size]

    def __iter__(self) -> Iterator[Any]:
        """Row by row; some MiB are read at a time."""
        for block in self.blocks():
            yield from block

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """First row and row after the last of each unit: what is read at once is fastest."""
        return self._pieces.bounds

    def tensor(self) -> Tensor:
        """All rows, as a tensor.

        Raises:
            ArgumentError: it is text.
        """
        if self.dtype is None:
            raise ArgumentError(f"{self!r} is text, which is no tensor; use numpy()")
        found: Tensor = self[:]
        return found

    def numpy(self) -> np.ndarray[Any, Any]:
        """All rows, as a NumPy array; types that NumPy lacks (bfloat16) as float32."""
        return _numpy(self[:])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        array = self.numpy()
        return array if dtype is None else array.astype(dtype, copy=False)

    def to_npy(self, path: str | Path) -> Path:
        """Write all rows to a `.npy` file, some MiB at a time; returns its path."""
        path = Path(path)
        if self.dtype is None:
            np.save(path, self.numpy().astype(str))
            return path
        dtype = _numpy(torch.empty(0, dtype=self.dtype)).dtype
        if not len(self):
            np.save(path, np.empty(self.shape, dtype))
            return path
        out = np.lib.format.open_memmap(path, "w+", dtype, self.shape)
        row = 0
        for block in self.blocks():
            out[row : row + len(block)] = _numpy(block)
            row += len(block)
        out.flush()
        return path

    def to_safetensors(self, path: str | Path) -> Path:
        """Write all rows to a safetensors file (extra: `safetensors`); returns its path."""
        return save_safetensors(path, {self.name: self.tensor()}, {})

    def __repr__(self) -> str:
        said = "text" if self.dtype is None else str(self.dtype).removeprefix("torch.")
        return f"StoredArray({self.name!r}, shape={'×'.join(map(str, self.shape))}, {said})"


class FeatureArray(StoredArray):
    """One kind of map of one layer, over a data set; axis 0 is of samples, or of tokens.

    Attributes:
        layer: name of the layer.
        kind: one of the five kinds.
        call: which call of the layer.
        path: place in a nested output.
        nonlinearity: σ, or None.
        per: "sample" or "token": what a row is of.
        filter_axis: axis that counts filters, or None.
        filters: the filters along it; None for all.
    """

    def __init__(self, spec: ArraySpec, pieces: Pieces) -> None:
        super().__init__(spec.name, pieces, spec.shape, spec.dtype)
        self.layer = spec.layer
        self.kind = spec.kind
        self.call = spec.call
        self.path = spec.path
        self.nonlinearity = spec.nonlinearity
        self.per = spec.per
        self.filter_axis = spec.filter_axis
        self.filters = spec.filters
        self._spec = spec

    @property
    def tags(self) -> Mapping[str, Any]:
        """All of these, as plain JSON."""
        return asdict(self._spec)

    def to_safetensors(self, path: str | Path) -> Path:
        """Write all rows to a safetensors file (extra: `safetensors`), with the tags."""
        tags = {self.name: json.dumps(self.tags)}
        return save_safetensors(path, {self.name: self.tensor()}, tags)

    def __repr__(self) -> str:
        said = str(self.dtype).removeprefix("torch.")
        sigma = f", σ={self.nonlinearity}" if self.nonlinearity else ""
        return (
            f"FeatureArray(layer={self.layer!r}, kind={self.kind!r}, "
            f"shape={'×'.join(map(str, self.shape))}, {said}{sigma})"
        )


def _numpy(values: Any) -> np.ndarray[Any, Any]:
    return as_numpy(values) if isinstance(values, Tensor) else np.asarray(values)


def save_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], tags: Mapping[str, str]
) -> Path:
    """Write tensors to a file."""
    says = "to_safetensors needs safetensors: pip install fmapkit[safetensors]"
    dense = {name: tensor.contiguous() for name, tensor in tensors.items()}
    needed("safetensors.torch", says).save_file(dense, str(path), metadata=dict(tags))
    return Path(path)
