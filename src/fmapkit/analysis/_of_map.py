"""Mean, variance, extremes and counts of one map in a CPU's memory, filter by filter.

The map is cut into blocks that stay in the cache (`_on_cpu.py` says what is done with each), along
the rows of memory where they are long, and across them where they are short.

Values are summed up shifted by a pilot p of each filter, S1 = Σ(x - p) and S2 = Σ(x - p)². Then
mean = p + S1/n and M2 = Σ(x - mean)² = S2 - S1²/n. (Chan, Golub, LeVeque, "Algorithms for computing
the sample variance: analysis and recommendations", The American Statistician 37, 1983.) The
subtraction loses as many digits as S2 has more than M2. Most maps need no pilot: their mean is not
far from 0 beside their spread. Of others, the maps before tell the mean. Where too many digits were
lost all the same, the sums are taken again, around the mean that is known then.
"""

from __future__ import annotations

from functools import cache, reduce

import numpy as np
import torch
from torch import Tensor

from fmapkit.analysis._bits import Array, Bits
from fmapkit.analysis._on_cpu import LANE, Bounds, Lines, Sums

__all__ = ["of_map"]

# Values of a block. Calls take some 15 µs for each, so it is not smaller; its float64 copy, 4 MiB,
# is read again from the third level of the cache. Of the powers from 2^15, which takes 2.5 times as
# long, to 2^20, which takes 1.1 times as long.
_BLOCK = 2**19
_LONG = 512  # rows of so many values are summed up along themselves, shorter ones across them
_FEW, _MEDIUM = 16, 128  # of so few inputs, rows of so many are
_WIDE = 4096  # columns that there should be to sum up across rows, or inner loops are short
_TALL = 16  # rows of a block to be summed up across, at least

_DIGITS_LOST = 1e3  # of 15, three at most
_TINY = 1e-280  # below it, squares lose digits to underflow
_NO_BETTER = 2.0**-48  # a pilot this near to the mean, beside itself, is as good as there is
_TRIES = 3


def of_map(values: Tensor, bounds: Bounds | None, pilot: Array | None) -> tuple[Tensor, ...]:
    """Shift, offset, m2, minimum, maximum and counts, as `Moments` has them.

    Args:
        values: (outer, filters, inner), real, integer or bool, at least one of each filter.
        bounds: at or below the first and at or above the second a value is saturated.
        pilot: (filters,) what the means may be near; 0 or None for no guess.
    """
    outer, filters, inner = values.shape
    with np.errstate(all="ignore"):  # NaN, infinities and overflow are told in the result
        found = _parts(values, pilot, bounds, False)
        none = np.zeros(filters, np.int64)
        told = found.zeros, found.nonfinite, found.saturated
        counts = np.array([none if c is None else c for c in told], np.int64)
        low, high = _extremes(found, values)
        shift = np.zeros(filters) if pilot is None else pilot
        for attempt in range(_TRIES):
            offset = found.s1 / (outer * inner)
            m2 = np.maximum(found.s2 - found.s1 * offset, 0)
            if attempt == _TRIES - 1 or _well(found.s2, m2):
                break
            lost = ~_settled(found.s2, m2, offset, shift)
            lost &= (counts[1] == 0) & ((low != 0) | (high != 0))
            if not lost.any():
                break
            shift = np.where(lost, np.nan_to_num(shift + offset), shift)
            found = _parts(values, shift, None, True)
    return tuple(map(torch.from_numpy, (shift, offset, m2, low, high, counts)))


def _well(s2: Array, m2: Array) -> bool:
    """Whether all sums have digits enough: in the usual case, by few operations."""
    least, most = np.minimum.reduce(s2), np.maximum.reduce(s2)
    return bool(least >= _TINY and most < np.inf and (s2 <= m2 * _DIGITS_LOST).all())


def _settled(s2: Array, m2: Array, offset: Array, shift: Array) -> Array:
    """Of which filters the sums have digits enough, or none to gain."""
    exact = (s2 <= m2 * _DIGITS_LOST) & (s2 < np.inf) & ((s2 >= _TINY) | (shift != 0))
    settled: Array = exact | (np.abs(offset) <= _NO_BETTER * np.abs(shift))
    return settled


def _extremes(found: Sums, values: Tensor) -> Array:
    """(2, filters): the least and the greatest of each filter."""
    assert found.top is not None
    assert found.high is not None
    assert found.zeros is not None
    kind = Bits.of(values.dtype if values.dtype.is_floating_point else torch.float64)
    keys = np.array(kind.keys(found.top, found.high, found.least, found.zeros))
    numbers = kind.numbers(keys)
    unknown = keys[0] == kind.most, keys[1] == kind.fewest
    for row, missing, way in zip(numbers, unknown, (torch.amin, torch.amax), strict=True):
        if missing.any():
            some = values[:, torch.from_numpy(np.flatnonzero(missing))]
            row[missing] = way(some, (0, 2)).to(torch.float64).numpy()
    if found.nonfinite is not None:
        numbers[:, np.isnan(numbers).any(0)] = np.nan
    return numbers


def _parts(values: Tensor, pilot: Array | None, bounds: Bounds | None, sums_only: bool) -> Sums:
    """What is found of each filter."""
    outer, _, inner = values.shape
    if inner > _BLOCK:
        pieces = (_parts(p, pilot, bounds, sums_only) for p in torch.split(values, _BLOCK, 2))
        return reduce(Sums.and_of, pieces)
    along = inner >= _LONG or (inner >= _MEDIUM and outer < _FEW)
    lines = Lines(values.dtype, int(along), bounds, sums_only)
    return (_by_rows if along else _by_columns)(values, pilot, lines)


def _by_rows(values: Tensor, pilot: Array | None, lines: Lines) -> Sums:
    outer, filters, inner = values.shape
    shifts = None if pilot is None else np.tile(pilot, outer)[:, None]
    together, step, row = max(1, _BLOCK // (filters * inner)), _BLOCK // inner, 0
    for some in torch.split(values, outer if values.is_contiguous() else together):
        for block in torch.split(some.flatten(0, 1), step):
            lines.see(block, None if shifts is None else shifts[row : row + len(block)])
            row += len(block)
    return lines.found().folded(outer, filters, 1)


def _by_columns(values: Tensor, pilot: Array | None, lines: Lines) -> Sums:
    outer, filters, inner = values.shape
    rows, lead, left = values.flatten(1, 2), 1, None
    width = rows.shape[1]
    if width < _WIDE and outer > 1 and rows.is_contiguous():  # several rows make one
        lead = _rows_in_one(outer, -(-_WIDE // width))
        whole = outer // lead * lead
        left = values[whole:] if whole < outer else None
        rows = rows[:whole].view(-1, lead * width)
        width *= lead
    shift = None if pilot is None else np.tile(np.repeat(pilot, inner), lead)
    strip = min(width, max(1, _BLOCK // _TALL))
    height = min(LANE, max(1, _BLOCK // strip))
    strips = []
    for at in range(0, width, strip):
        part = lines.anew()
        here = None if shift is None else shift[at : at + strip]
        for block in torch.split(rows[:, at : at + strip], height):
            part.see(block, here)
        strips.append(part.found())
    result = Sums.joined(strips).folded(lead, filters, inner)
    return result if left is None else result.and_of(_by_columns(left, pilot, lines))


@cache
def _rows_in_one(rows: int, wanted: int) -> int:
    """So many, or a few times as many if that leaves none over; all, if there are no more."""
    some = range(wanted, min(4 * wanted, rows) + 1)
    return next((n for n in some if rows % n == 0), min(wanted, rows))
