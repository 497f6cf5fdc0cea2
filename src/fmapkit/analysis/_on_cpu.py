"""Sums, extremes and counts of one map in a CPU's memory, filter by filter, a block at a time.

A block is copied to float64, which its sums need; all else reads what is in the cache by then. What
each operation takes was measured (one core with AVX-512, torch 2.13, NumPy 2.4; ns a value, of
float32; to read it takes 0.11 from memory, 0.04 from the cache):

* The copy 0.18 from memory. Nothing of torch or NumPy sums up float32 in float64 without one:
  `torch.sum(dtype=...)` makes one too, 0.25; `np.add.reduce(dtype=...)` does in pieces, 0.26;
  `torch.var_mean` takes 4.3.
* The sum: along rows 0.08 by torch, 0.14 by NumPy; across rows 0.09 by BLAS, up to 0.24 by torch.
* The sum of squares: along rows 0.08 by `np.vecdot`, 0.2 by `torch.linalg.vecdot`; across rows
  0.18, the squares written and summed up by BLAS. A matrix product for both sums takes 0.4 or more.
* The extremes 0.04 each, as integers (see `_bits.py`).
* Zeros: flags 0.045, counted by words of eight 0.02; `torch.count_nonzero` takes 0.23.

Together 0.53 along rows and 0.66 across: five or six reads from memory, and no set of calls was
found that takes less.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmapkit.analysis._bits import Array, Bits

__all__ = ["LANE", "Bounds", "Found", "Lines"]

Bounds = tuple[float, float]
LANE = 255  # ones that a byte can count
_WORD = 8
_vecdot: Any = getattr(np, "vecdot", None)  # since NumPy 2.0

# What puts numbers of one line together, for NumPy, and along an axis, for torch.
_WAYS: dict[str, tuple[np.ufunc, Callable[..., Any]]] = {
    "top": (np.maximum, torch.amax),
    "high": (np.maximum, torch.amax),
    "least": (np.minimum, torch.amin),
}
_SUM = (np.add, torch.sum)


@dataclass(slots=True)
class Found:
    """What is known of lines of values, or of filters: of each a number. For bits, see `Bits`.

    Attributes:
        s1: Σ(x - p), of a pilot p.
        s2: Σ(x - p)².
        top: the greatest bits without a sign, less the sign's; None, as what follows, if not asked.
        high: the greatest bits with a sign.
        zeros: how many are 0.
        least: where no value has a sign, the least bits, or 0 if they were not looked for.
        nonfinite: how many are NaN or infinite; None if none is.
        saturated: how many are at or beyond the bounds; None without bounds.
    """

    s1: Array
    s2: Array
    top: Array | None = None
    high: Array | None = None
    zeros: Array | None = None
    least: Array | None = None
    nonfinite: Array | None = None
    saturated: Array | None = None

    def columns(self) -> dict[str, Array]:
        """What is there, by its name."""
        found = {name: getattr(self, name) for name in self.__slots__}
        return {name: numbers for name, numbers in found.items() if numbers is not None}

    def _and_zeros(self, names: Iterable[str]) -> dict[str, Array]:
        """The same, and 0 for all else that is named."""
        return {name: np.zeros(len(self.s1), np.int32) for name in names} | self.columns()

    def and_of(self, other: Found) -> Found:
        """Of the same lines' other values too."""
        mine, theirs = self._and_zeros(other.columns()), other._and_zeros(self.columns())
        both = {n: _WAYS.get(n, _SUM)[0](numbers, theirs[n]) for n, numbers in mine.items()}
        return Found(**both)

    @staticmethod
    def joined(several: list[Found]) -> Found:
        """Of the lines of one after those of the other."""
        if len(several) == 1:
            return several[0]
        names = {name for found in several for name in found.columns()}
        every = [found._and_zeros(names) for found in several]
        return Found(**{name: np.concatenate([c[name] for c in every]) for name in names})

    def folded(self, lead: int, filters: int, trail: int) -> Found:
        """Of filters, of which each has several lines: (lead, filters, trail) of them."""
        if lead == trail == 1:
            return self
        columns = self.columns()
        for name, numbers in columns.items():
            way, along = _WAYS.get(name, _SUM)
            if trail > 1:  # rows this short take NumPy 30 ns each, torch a few
                lines = torch.from_numpy(numbers).view(lead, filters, trail)
                numbers = along(lines, 2).numpy()
            rows = numbers.reshape(lead, filters)
            columns[name] = rows[0] if lead == 1 else way.reduce(rows, axis=0)
        return Found(**columns)


class _Room(threading.local):
    """Memory for a block, kept for the next: what the system gives anew costs more than its use."""

    def __init__(self) -> None:
        self._kept: dict[str, Array] = {}

    def of(self, use: str, rows: int, columns: int, dtype: Any) -> Array:
        """So much of it, with anything in it."""
        size, kept = rows * columns, self._kept.get(use)
        if kept is None or len(kept) < size:
            kept = self._kept[use] = np.empty(size, dtype)
        return kept[:size].reshape(rows, columns)


_room = _Room()


class Lines:
    """Looks at block after block, of which lines are the rows, or the columns of all blocks.

    What a block tells is kept as it is, and put together once, by `found`: calls cost.

    Args:
        dtype: of the values.
        axis: 1 for rows, 0 for columns; then a block has at most `LANE` rows.
        bounds: of saturation, or None.
        sums_only: leave out the extremes and counts.
    """

    def __init__(
        self, dtype: torch.dtype, axis: int, bounds: Bounds | None, sums_only: bool
    ) -> None:
        self._dtype, self._asked = dtype, bounds
        self._made_wide = not dtype.is_floating_point
        self._is_wide = dtype == torch.float64
        self._half = dtype == torch.float16  # by way of float32: 0.14 ns instead of 0.25
        self._bits = Bits.of(torch.float64 if self._made_wide else dtype)
        self._axis, self._sums_only = axis, sums_only
        self._bounds = _rounded(*bounds) if bounds and dtype == torch.float32 else bounds
        self._kept: defaultdict[str, list[tuple[int, Array]]] = defaultdict(list)
        self._shapes: list[tuple[int, int]] = []
        self._zeros_are_usual: bool | None = None

    def anew(self) -> Lines:
        """One that is asked the same, and has seen nothing."""
        return Lines(self._dtype, self._axis, self._asked, self._sums_only)

    def see(self, x: Tensor, shift: Array | None) -> None:
        """Take in a block.

        Args:
            x: (rows, columns).
            shift: the pilots, to be broadcast; or None.
        """
        self._shapes.append((x.shape[0], x.shape[1]))
        own = shift is not None or not self._is_wide
        wide = self._widened(x) if own else x.numpy()
        if not self._sums_only:
            self._look(torch.from_numpy(wide) if self._made_wide else x, wide)
        if shift is not None:
            np.subtract(wide, shift, out=wide)
        if self._axis:
            self._keep("s1", torch.from_numpy(wide).sum(1).numpy())
            self._keep("s2", _vecdot(wide, wide) if _vecdot else np.einsum("ij,ij->i", wide, wide))
            return
        ones = np.ones(len(wide))
        self._keep("s1", np.matmul(ones, wide))
        out = wide if own else _room.of("wide", *self._shapes[-1], np.float64)
        self._keep("s2", np.matmul(ones, np.multiply(wide, wide, out=out)))

    def _keep(self, name: str, numbers: Array) -> None:
        self._kept[name].append((len(self._shapes) - 1, numbers))

    def _widened(self, x: Tensor) -> Array:
        wide = _room.of("wide", *self._shapes[-1], np.float64)
        if self._half:
            x = torch.from_numpy(_room.of("single", *self._shapes[-1], np.float32)).copy_(x)
        torch.from_numpy(wide).copy_(x)
        return wide

    def _look(self, x: Tensor, wide: Array) -> None:
        """The extremes and counts."""
        kind, axis = self._bits, self._axis
        bits = kind.bits(x)
        numbers = wide if kind.short else x.numpy()
        top = np.maximum.reduce(bits.view(kind.unsigned), axis=axis)
        negative = kind.some_negative(top)
        high = np.maximum.reduce(bits, axis=axis) if negative else top.view(kind.signed)
        self._keep("top", top)
        self._keep("high", high)
        # NumPy compares floats of 16 bits one by one, integers as fast as the cache gives them.
        words = self._words(np.equal, bits if kind.short else numbers, 0)
        self._keep("zeros", words)
        if not negative:
            if self._zeros_are_usual is None:
                self._zeros_are_usual = bool((self._lanes(words) > 0).all())
            if not self._zeros_are_usual:
                self._keep("least", np.minimum.reduce(bits, axis=axis))
        elif kind.short and bits.min() == kind.fewest:  # -0, as an integer
            self._keep("minus zeros", self._words(np.equal, bits, kind.fewest))
        if kind.some_not_finite(top, high):
            self._keep("nonfinite", self._words(_not_finite, numbers))
        if self._bounds is not None:
            least, most = self._bounds
            self._keep("below", self._words(np.less_equal, numbers, least))
            self._keep("above", self._words(np.greater_equal, numbers, most))

    def _words(self, compare: Any, numbers: Array, *value: Any) -> Array:
        """Where a comparison is true, counted by words of which each byte counts apart.

        NumPy writes such flags at the speed of the cache, torch as slowly as numbers.

        Returns:
            Of rows (rows, groups), as a byte cannot count all of a row; of columns, (words,).
        """
        rows, columns = numbers.shape
        words = -(-columns // _WORD)
        groups = -(-words // LANE) if self._axis else 1
        pitch = -(-words // groups) * groups * _WORD
        flags = _room.of("flags", rows, pitch, np.uint8)
        if pitch > columns:
            flags[:, columns:] = 0
        compare(numbers, *value, out=flags[:, :columns].view(np.bool_))
        found = flags.view(np.int64)
        if self._axis:
            found = found.reshape(rows, groups, -1)
        counts: Array = np.add.reduce(found, axis=2 if self._axis else 0)
        return counts

    # -- all blocks ------------------------------------------------------------------------------

    def found(self) -> Found:
        """Of each line."""
        s1, s2 = (self._together(name, np.add) for name in ("s1", "s2"))
        if self._sums_only:
            return Found(s1, s2)
        top, high = (self._together(name, np.maximum) for name in ("top", "high"))
        result = Found(s1, s2, self._bits.ordered(top), high, self._counted("zeros", "minus zeros"))
        if "least" in self._kept:
            result.least = self._together("least", np.minimum)
        if "nonfinite" in self._kept:
            result.nonfinite = self._counted("nonfinite")
        if "below" in self._kept:
            result.saturated = self._counted("below", "above")
        return result

    def _together(self, name: str, way: np.ufunc) -> Array:
        """What was kept of all blocks, put together; 0 where nothing was."""
        kept = self._kept[name]
        if len(kept) == len(self._shapes) == 1:
            return kept[0][1]
        if len(kept) < len(self._shapes):
            some, blocks = dict(kept), range(len(self._shapes))
            kept = [(n, some[n] if n in some else self._nothing(name, n)) for n in blocks]
        parts = [numbers for _, numbers in kept]
        return np.concatenate(parts) if self._axis else reduce(way, parts)

    def _nothing(self, name: str, block: int) -> Array:
        """Zeros, as many as a block gives of what it was asked for."""
        like = self._kept[name][0][1]
        lines = self._shapes[block][0] if self._axis else len(like)
        return np.zeros((lines, *like.shape[1:]), like.dtype)

    def _counted(self, *names: str) -> Array:
        """How many of each line, by words of one name or several."""
        counts = []
        for name in names:
            if name in self._kept and self._axis:
                counts.append(self._lanes(self._together(name, np.add)))
            elif name in self._kept:  # a byte counts no further than one block
                counts += [self._lanes(words) for _, words in self._kept[name]]
        return reduce(np.add, counts)

    def _lanes(self, words: Array) -> Array:
        """The counts in the bytes of words, line by line."""
        lanes = words.view(np.uint8)
        if not self._axis:
            return lanes[: self._shapes[0][1]].astype(np.int32)
        counts: Array = np.add.reduce(lanes, axis=1, dtype=np.int32)
        return counts


def _not_finite(numbers: Array, out: Array) -> None:
    # Not `isfinite`: to flags that do not lie side by side, NumPy 2.4 writes wrong ones.
    np.logical_not(np.less(np.abs(numbers), np.inf), out=out)


def _rounded(low: float, high: float) -> Bounds:
    """The float32 numbers that a float32 is at or below, or above, just when it is the given."""
    least, most = np.float32(low), np.float32(high)
    if float(least) > low:
        least = np.nextafter(least, np.float32(-np.inf))
    if float(most) < high:
        most = np.nextafter(most, np.float32(np.inf))
    return float(least), float(most)
