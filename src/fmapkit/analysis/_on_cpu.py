"""Sums, extremes and counts of one map in a CPU's memory, filter by filter, by calls of torch.

A block at a time is copied to float64 and gone through by each call, from the cache. `_fused.py`
finds the same in one pass, where numba is installed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmapkit.analysis._blocks import along, block_size, blocks
from fmapkit.analysis._saturation import Bounds

Array = np.ndarray[Any, Any]

# The rows of what is found of each filter: Σ(x - p) and Σ(x - p)² of a pilot p, how many are 0, how
# many at or beyond the bounds, the least and the greatest.
S1, S2, ZEROS, SATURATED, LOW, HIGH = range(6)


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
