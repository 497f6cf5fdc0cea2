"""Sums, extremes and counts of one map in a CPU's memory, in one pass; compiled by numba.

Each call of torch or NumPy goes through a block of values once (`_blocks.py`). Here a value is read
once, made float64 in a register, and added to all that is asked for. The machine's instructions
take 8 or 16 values at once, if these lie side by side. So there are two loops: along the rows of
memory where each has many values of one filter, across them where it has few.

Half precision comes as its bits, since NumPy has no bfloat16 and numba no float16 on a CPU: an
int16 is a bfloat16, an uint16 is a float16. Other integers come as float64.

A function is compiled for each type of values, without bounds and with, when it is first called; no
shape makes a difference. The machine code is kept in numba's cache, for the next process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from numba import njit, types
from numba.extending import overload
from torch import Tensor

from fmapkit.analysis._blocks import Array, nothing
from fmapkit.analysis._saturation import Bounds

# The rows of what is found, as in `_blocks.py`. They stand here again, since numba keeps machine
# code until this file changes, whatever happens to others.
S1, S2, ZEROS, SATURATED, LOW, HIGH = range(6)

# Rows of so many values are gone through along themselves, shorter ones across; of few, more.
_LONG, _MEDIUM, _FEW = 96, 16, 16
_PIECE = 2**16  # of a row, whose sum is taken apart: the sum of very many loses digits
_STRIP = 1024  # columns that are taken at once: their accumulators stay in a near cache, 56 KiB
_KEPT = _STRIP + 40  # from row to row of them: no power of two, which share lines of a cache
_PILOT = 6  # the row of accumulators that has what to take off; the others are what is found
_ROWS = 8  # rows that are taken at once: accumulators are loaded and kept once for all
_FEWEST, _MOST = 256, 1024  # rows of a block, whose sums are taken apart
_BLOCK = 2**18  # values of a block, within these limits
_NARROW = 128  # rows that are shorter are taken together, several as one

_F = TypeVar("_F", bound=Callable[..., Any])


def _compiled(*freedom: str) -> Callable[[_F], _F]:
    """Compiles a function when it is called; NaN and infinity stay what they are."""
    made: Callable[[_F], _F] = njit(
        cache=True, nogil=True, error_model="numpy", fastmath=set(freedom)
    )
    return made


_inlined: Callable[[_F], _F] = njit(inline="always")


def _typed(function: Callable[..., Any]) -> Callable[[_F], _F]:
    """What stands for a function in compiled code, by the types of its arguments."""
    stands: Callable[[_F], _F] = overload(function, strict=False)  # not strict on annotations
    return stands


# -- numbers ---------------------------------------------------------------------------------------


def _number(x: Any) -> Any:
    """The float32 or float64 that a value stands for."""


@_typed(_number)
def _number_of(x: Any) -> Any:
    if x == types.int16:
        return lambda x: np.int32(np.int32(x) << np.int32(16)).view(np.float32)
    if x == types.uint16:
        return _float16
    return lambda x: x


def _float16(x: Any) -> Any:
    size = np.int32(np.int32(x) & np.int32(0x7FFF))
    bits = np.int32(np.int32(size << np.int32(13)) + np.int32(112 << 23))  # exponent of float32
    if size >= 0x7C00:  # infinity, NaN
        bits = np.int32(bits + np.int32(112 << 23))
    number = np.int32(bits).view(np.float32)
    if size < 0x400:  # subnormal, or 0
        number = np.float32(size) * np.float32(2.0**-24)
    return -number if x >= 0x8000 else number


def _key(x: Any) -> Any:
    """An integer that grows with the number; a NaN's is above or below those of all numbers."""


@_typed(_key)
def _key_of(x: Any) -> Any:
    if x == types.float32:
        return lambda x: _turned(np.float32(x).view(np.int32))
    return lambda x: _turned(np.float64(x).view(np.int64))


def _turned(bits: Any) -> Any:
    """The bits of a float, with those of negative ones but for the sign inverted; and back."""


@_typed(_turned)
def _turned_of(bits: Any) -> Any:
    if bits == types.int32:
        return lambda bits: np.int32(bits ^ np.int32(np.int32(bits >> 31) & np.int32(2**31 - 1)))
    return lambda bits: bits ^ ((bits >> 63) & (2**63 - 1))


def _of_key(key: Any) -> Any:
    """The float64 of a key."""


@_typed(_of_key)
def _of_key_of(key: Any) -> Any:
    if key == types.int32:
        return lambda key: np.float64(np.int32(_turned(key)).view(np.float32))
    return lambda key: np.int64(_turned(key)).view(np.float64)


def _outside(x: Any, bounds: Any) -> Any:
    """Whether a value is at one of the bounds or beyond, if there are any."""


@_typed(_outside)
def _outside_of(x: Any, bounds: Any) -> Any:
    if isinstance(bounds, types.NoneType):
        return lambda x, bounds: False
    return lambda x, bounds: (x <= bounds[0]) | (x >= bounds[1])


@_compiled()
def _difference(x: Any, shift: Any) -> Any:
    """In a function of its own, which may not be reordered: s1 - shift first would lose digits."""
    return x - shift


# -- loops -----------------------------------------------------------------------------------------


@_compiled()
def _add(found: Any, c: int, s1: Any, s2: Any, low: Any, high: Any, zeros: Any, outs: Any) -> None:
    """Puts to what is found of a filter."""
    found[S1, c] += s1
    found[S2, c] += s2
    if low < found[LOW, c]:
        found[LOW, c] = low
    if high > found[HIGH, c]:
        found[HIGH, c] = high
    found[ZEROS, c] += zeros
    found[SATURATED, c] += outs


@_compiled("contract", "reassoc")  # so that lanes are summed up apart
def _along(flat: Any, shape: Any, strides: Any, pilot: Any, bounds: Any, found: Any) -> None:
    """Of rows that are of one filter each.

    The extremes are those of keys, as LLVM does not take those of floats in lanes. A NaN's key may
    be one: then s2 is NaN too.
    """
    outer, filters, inner = shape
    for o in range(outer):
        for c in range(filters):
            for at in range(0, inner, _PIECE):
                start = o * strides[0] + c * strides[1] + at
                row = flat[start : start + min(_PIECE, inner - at)]
                s1, s2, zeros, outs = 0.0, 0.0, 0, 0
                low = high = _key(_number(row[0]))
                for i in range(len(row)):
                    x = _number(row[i])
                    wide = np.float64(x)
                    d = _difference(wide, pilot[c])
                    s1 += d
                    s2 += d * d
                    zeros += x == 0
                    outs += _outside(wide, bounds)
                    low = min(low, _key(x))
                    high = max(high, _key(x))
                _add(found, c, s1, s2, _of_key(low), _of_key(high), zeros, outs)


@_inlined
def _rows(flat: Any, start: int, pitch: int, rows: int, width: int, bounds: Any, kept: Any) -> None:
    """Takes rows into the accumulators of their columns.

    These are one array, at distances that LLVM knows: of several, it would not know that they are
    apart, and take value by value. That is why floats count, too. `np.uintp` tells it that no index
    is from the end.
    """
    for j in range(width):
        s1, s2 = kept[S1 * _KEPT + j], kept[S2 * _KEPT + j]
        low, high = kept[LOW * _KEPT + j], kept[HIGH * _KEPT + j]
        zeros, outs = kept[ZEROS * _KEPT + j], kept[SATURATED * _KEPT + j]
        shift = kept[_PILOT * _KEPT + j]
        for r in range(rows):
            x = np.float64(_number(flat[np.uintp(start + r * pitch + j)]))
            s1 += x - shift
            s2 += (x - shift) * (x - shift)
            low = x if x < low else low
            high = x if x > high else high
            zeros += 1.0 if x == 0 else 0.0
            outs += 1.0 if _outside(x, bounds) else 0.0
        kept[S1 * _KEPT + j], kept[S2 * _KEPT + j] = s1, s2
        kept[LOW * _KEPT + j], kept[HIGH * _KEPT + j] = low, high
        kept[ZEROS * _KEPT + j], kept[SATURATED * _KEPT + j] = zeros, outs


@_compiled("contract")
def _across(
    flat: Any, rows: int, pitch: int, columns: int, inner: int, pilot: Any, bounds: Any, found: Any
) -> None:
    """Of rows of columns; `inner` columns are of one filter, the next of the next, and so on."""
    kept = np.empty((_PILOT + 1) * _KEPT)
    filters = len(pilot)
    height = max(_FEWEST, min(_MOST, _BLOCK // columns // _ROWS * _ROWS))
    for top in range(0, rows, height):
        bottom = min(rows, top + height)
        for at in range(0, columns, _STRIP):
            width = min(_STRIP, columns - at)
            kept[: LOW * _KEPT] = 0
            kept[LOW * _KEPT : HIGH * _KEPT] = np.inf
            kept[HIGH * _KEPT : _PILOT * _KEPT] = -np.inf
            c, left = at // inner % filters, inner - at % inner
            for j in range(width):
                kept[_PILOT * _KEPT + j] = pilot[c]
                left -= 1
                if not left:
                    c, left = c + 1 if c + 1 < filters else 0, inner
            row = top
            while row + _ROWS <= bottom:
                _rows(flat, row * pitch + at, pitch, _ROWS, width, bounds, kept)
                row += _ROWS
            while row < bottom:
                _rows(flat, row * pitch + at, pitch, 1, width, bounds, kept)
                row += 1
            _fold(kept, at, width, inner, filters, found)


@_compiled()
def _fold(kept: Any, at: int, width: int, inner: int, filters: int, found: Any) -> None:
    """Puts the columns of a strip to their filters."""
    c, end, j = at // inner % filters, inner - at % inner, 0
    while j < width:
        s1, s2, low, high, zeros, outs = 0.0, 0.0, np.inf, -np.inf, 0.0, 0.0
        for k in range(j, min(end, width)):
            s1 += kept[S1 * _KEPT + k]
            s2 += kept[S2 * _KEPT + k]
            low = kept[LOW * _KEPT + k] if kept[LOW * _KEPT + k] < low else low
            high = kept[HIGH * _KEPT + k] if kept[HIGH * _KEPT + k] > high else high
            zeros += kept[ZEROS * _KEPT + k]
            outs += kept[SATURATED * _KEPT + k]
        _add(found, c, s1, s2, low, high, zeros, outs)
        c, j, end = c + 1 if c + 1 < filters else 0, end, end + inner


# -- maps ------------------------------------------------------------------------------------------


def sums(values: Tensor, pilot: Array, bounds: Bounds | None) -> Array:
    """What is found of each filter, as `_blocks.sums` tells it; by one thread."""
    found = nothing(len(pilot))
    for some in _readable(values):
        outer, filters, inner = some.shape
        flat, pitch, columns = _flat(some), some.stride(0), filters * inner
        if _goes_along(outer, inner):
            _along(flat, (outer, filters, inner), some.stride(), pilot, bounds, found)
            continue
        several = max(1, min(_NARROW // columns, outer // _ROWS)) if some.is_contiguous() else 1
        rows, left = divmod(outer, several)
        _across(flat, rows, pitch * several, columns * several, inner, pilot, bounds, found)
        if left:
            rest = flat[rows * several * columns :]
            _across(rest, left, pitch, columns, inner, pilot, bounds, found)
    return found


def _goes_along(outer: int, inner: int) -> bool:
    return inner >= _LONG or (inner >= _MEDIUM and outer < _FEW)


def _readable(values: Tensor) -> Iterator[Tensor]:
    """Floats whose rows lie in memory as the loops take them: the values, or copies in pieces."""
    outer, filters, inner = values.shape
    if _goes_along(outer, inner):
        fine = values.stride(2) == 1
    else:
        fine = values[0].is_contiguous() and (filters * inner >= _NARROW or values.is_contiguous())
    if fine and values.is_floating_point():
        yield values
        return
    kind = values.dtype if values.is_floating_point() else torch.float64
    for some in torch.split(values, max(1, _BLOCK // (filters * inner))):
        yield some.to(kind).contiguous()


def _flat(values: Tensor) -> Array:
    """The memory from the first value to the last."""
    steps = zip(values.shape, values.stride(), strict=True)
    flat = values.as_strided((1 + sum((n - 1) * step for n, step in steps),), (1,))
    if flat.element_size() == 2:
        flat = flat.view(torch.int16 if flat.dtype == torch.bfloat16 else torch.uint16)
    numbers: Array = flat.numpy()
    return numbers
