"""Mean, variance, extremes and counts of many values, filter by filter, by calls of torch.

In a CPU's memory (`sums`), a block at a time is copied to float64 and gone through by each call,
from the cache. `_fused.py` finds the same in one pass, where numba is installed.

`blockwise` is for what is not a CPU. Nothing there depends on a value on the host, so nothing waits
for the device, and each result is one reduction that goes through the block once. Bytes that are
moved for each value of float32, of which a read is 4: for the float64 copy 12, for mean and
variance together 8, for both extremes 4 (8 but on CUDA), for the zeros 4, for what is not finite
12: 40, or ten reads. **None of it has been measured on a GPU.**
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmapkit.analysis._saturation import Bounds

Array = np.ndarray[Any, Any]

# The rows of what is found of each filter: Σ(x - p) and Σ(x - p)² of a pilot p, how many are 0, how
# many at or beyond the bounds, the least and the greatest.
S1, S2, ZEROS, SATURATED, LOW, HIGH = range(6)

# Values that are worked on at a time: on a CPU what stays in its cache; elsewhere it bounds the
# memory that copies take, and a sum of so many ones is still exact in float32.
_BLOCK = {"cpu": 2**18}
_BLOCK_ELSEWHERE = 2**24
_LONG = 128  # rows of so many values are gone through along themselves first, shorter ones across


def at_hand(device: torch.device) -> bool:
    """Whether values can be looked at without waiting for the device."""
    return device.type == "cpu"


def block_size(device: torch.device) -> int:
    """How many values to work on at a time."""
    size = _BLOCK.get(device.type)
    # Each thread works on its share of a block, in a cache of its own.
    return _BLOCK_ELSEWHERE if size is None else size * min(torch.get_num_threads(), 16)


def blockwise(values: Tensor, kind: torch.dtype, bounds: Bounds | None) -> tuple[Tensor, ...]:
    """Shift, offset, m2, minimum, maximum and counts, as `Moments` has them.

    Args:
        values: (outer, filters, inner), real, integer or bool, at least one of each filter.
        kind: the type to work in.
    """
    parts: dict[int, tuple[int, tuple[Tensor, ...]]] = {}
    for first, block in blocks(values, block_size(values.device)):
        count, state = block.shape[0] * block.shape[2], _state(block, kind, bounds)
        if first in parts:
            seen, before = parts[first]
            count, state = seen + count, chan(torch, seen, before, count, state)
        parts[first] = count, state
    states = [state for _, state in parts.values()]
    return tuple(torch.cat(column, -1) for column in zip(*states, strict=True))


def blocks(values: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    """The values, at most so many at a time: the first filter, and (outer, filters, inner).

    Of two blocks, the filters are the same or none is.
    """
    _, filters, inner = values.shape
    step = min(filters, max(1, size // inner))
    for first, strip in zip(range(0, filters, step), torch.split(values, step, 1), strict=True):
        if inner > size:  # one filter
            for row in strip.unbind():
                yield from ((first, piece) for piece in torch.split(row[None], size, 2))
        else:
            height = max(1, size // (step * inner))
            yield from ((first, block) for block in torch.split(strip, height))


def _state(block: Tensor, kind: torch.dtype, bounds: Bounds | None) -> tuple[Tensor, ...]:
    """The same of one block."""
    count, over = block.shape[0] * block.shape[2], (0, 2)
    # Of some value: what is left of each is near 0, where float32, if that is all there is, has
    # digits enough. The sum is of the pilots' type; no copy is made before it.
    shift = torch.nan_to_num(block[0, :, 0].to(kind), 0.0, 0.0, 0.0)
    variance, offset = torch.var_mean(torch.add(block, -shift[:, None]), over, correction=0)
    raw = block if block.is_floating_point() else block.to(kind)
    low, high = (extreme.to(kind) for extreme in _extremes(raw))
    # The mean of what is infinite is so too, or not a number where both infinities are.
    infinite = torch.where(high == torch.inf, high, 0) + torch.where(low == -torch.inf, low, 0)
    offset = torch.where(infinite == 0, offset, infinite)
    counts = [count - _nonzero(raw), _nonzero(raw * 0)]  # NaN times 0 is none, nor is infinity's
    counts.append(torch.zeros_like(counts[0]))
    if bounds is not None:
        single = raw.float() if raw.element_size() == 2 else raw  # in which bounds are less rounded
        counts[-1] = along(torch.sum, (single <= bounds[0]) | (single >= bounds[1]))
    return shift, offset, variance * count, low, high, torch.stack(counts)


def _extremes(raw: Tensor) -> tuple[Tensor, Tensor]:
    if raw.device.type != "cuda":
        return along(torch.amin, raw), along(torch.amax, raw)
    first = 2 if raw.shape[2] > 1 else 0
    low, high = torch.aminmax(raw, dim=first)
    last = 0 if first else 1
    return low.amin(last), high.amax(last)


def _nonzero(raw: Tensor) -> Tensor:
    """How many are not 0, exact up to 2^24 of a filter."""
    kind = torch.float64 if raw.dtype == torch.float64 else torch.float32
    number: Tensor = torch.linalg.vector_norm(raw, 0, (0, 2), dtype=kind)
    return number.to(torch.int64)


def along(op: Any, block: Tensor) -> Tensor:
    """A reduction to (C,), in the order of axes that keeps the inner loop long."""
    first, last = (2, 0) if block.shape[2] >= _LONG or block.shape[0] == 1 else (0, 1)
    reduced: Tensor = op(block, first)
    if reduced.shape[last] == 1:
        return reduced.squeeze(last)
    whole: Tensor = op(reduced, last)
    return whole


def chan(library: Any, n: int, a: Sequence[Any], m: int, b: Sequence[Any]) -> tuple[Any, ...]:
    """Shift, offset, m2, minimum, maximum and counts of both sides, as `Moments` has them.

    The pairwise rule of Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for
    computing sample variances", Stanford CS-79-773, 1979. Means are kept as differences to a fixed
    value near them: far from 0 the mean's last digit is coarse beside the spread of the values.

    Args:
        library: whose arrays they are, `torch` or `numpy`.
        n: values of each filter of one side.
        m: values of the other.
    """
    shift, offset, m2, low, high, counts = a
    its_shift, its_offset, its_m2, its_low, its_high, its_counts = b
    delta = (its_shift - shift) + (its_offset - offset)
    between = offset + delta * (m / (n + m))
    # Infinite already: so it stays, as in NumPy, though inf - inf above is not a number.
    return (
        shift,
        library.where(library.isinf(offset), offset + its_offset, between),
        m2 + its_m2 + delta * delta * (n / (n + m) * m),
        library.minimum(low, its_low),
        library.maximum(high, its_high),
        counts + its_counts,
    )


# -- on a CPU --------------------------------------------------------------------------------------


def nothing(filters: int) -> Array:
    """(6, filters): what is found of no value."""
    found = np.zeros((6, filters))
    found[LOW], found[HIGH] = np.inf, -np.inf
    return found


def sums(values: Tensor, pilot: Array, bounds: Bounds | None) -> Array:
    """What is found of each filter.

    Args:
        values: (outer, filters, inner), real, integer or bool, at least one of each filter.
        pilot: (filters,) what to take off before values are summed up.

    Returns:
        (6, filters) float64, of which the rows are named above. Where a value is NaN, the sum of
        squares is, and the extremes are anything; where one is infinite, it is infinite.
    """
    found = nothing(len(pilot))
    shift = torch.from_numpy(pilot)[:, None] if pilot.any() else None
    with np.errstate(invalid="ignore"):
        for first, block in blocks(values, block_size(values.device)):
            here = slice(first, first + block.shape[1])
            _take(block, None if shift is None else shift[here], bounds, found[:, here])
    return found


def _take(block: Tensor, shift: Tensor | None, bounds: Bounds | None, found: Array) -> None:
    """Puts a block to what is found. It is smaller than 2^24, up to where float32 counts."""
    if block.element_size() == 2:  # in half precision, each call takes longer than a copy
        block = block.float()
    wide = block.to(torch.float64, copy=True)
    flags = torch.empty_like(block, dtype=torch.float32)  # of all types, the fastest to add up
    raw = block if block.is_floating_point() else wide
    np.minimum(found[LOW], along(torch.amin, raw).numpy(), out=found[LOW])
    np.maximum(found[HIGH], along(torch.amax, raw).numpy(), out=found[HIGH])
    found[ZEROS] += along(torch.sum, torch.eq(raw, 0, out=flags)).numpy()
    if bounds is not None:
        found[SATURATED] += along(torch.sum, torch.le(wide, bounds[0], out=flags)).numpy()
        found[SATURATED] += along(torch.sum, torch.ge(wide, bounds[1], out=flags)).numpy()
    if shift is not None:
        wide -= shift
    found[S1] += along(torch.sum, wide).numpy()
    found[S2] += along(torch.sum, wide.square_()).numpy()


def nonfinite(values: Tensor) -> Array:
    """(filters,): how many are NaN or infinite."""
    found = np.zeros(values.shape[1])
    for first, block in blocks(values, block_size(values.device)):
        flags = torch.ne(block - block, 0)  # infinity less itself is no number
        found[first : first + block.shape[1]] += along(torch.sum, flags).numpy()
    return found
