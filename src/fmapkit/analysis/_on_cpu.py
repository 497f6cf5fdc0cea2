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

__all__ = [*("HIGH", "LOW", "S1", "S2", "SATURATED", "ZEROS"), "Array", "nothing", "nonfinite"]
__all__ += ["sums", "together"]

Array = np.ndarray[Any, Any]

# The rows of what is found of each filter: Σ(x - p) and Σ(x - p)² of a pilot p, the least and the
# greatest, how many are 0, and at or beyond the bounds.
S1, S2, LOW, HIGH, ZEROS, SATURATED = range(6)


def nothing(filters: int) -> Array:
    """(6, filters): what is found of no value."""
    found = np.zeros((6, filters))
    found[LOW], found[HIGH] = np.inf, -np.inf
    return found


def together(a: Array, b: Array) -> Array:
    """What is found of the values of both."""
    both: Array = a + b
    both[LOW], both[HIGH] = np.minimum(a[LOW], b[LOW]), np.maximum(a[HIGH], b[HIGH])
    return both


def sums(values: Tensor, pilot: Array, bounds: Bounds | None) -> Array:
    """What is found of each filter.

    Args:
        values: (outer, filters, inner), real, integer or bool, at least one of each filter.
        pilot: (filters,) what to take off before values are summed up.
        bounds: of saturation, or None.

    Returns:
        (6, filters) float64, of which the rows are named above. Where a value is NaN, the sum of
        squares is, and the extremes are anything; where one is infinite, it is infinite.
    """
    found = nothing(len(pilot))
    shift = torch.from_numpy(pilot)
    for first, block in blocks(values, block_size(values.device)):
        here = slice(first, first + block.shape[1])
        found[:, here] = together(found[:, here], _of_block(block, shift[here, None], bounds))
    return found


def _of_block(block: Tensor, shift: Tensor, bounds: Bounds | None) -> Array:
    """The same of one block. It is smaller than 2^24, up to where float32 counts."""
    if block.element_size() == 2:  # in half precision, each call takes longer than a copy
        block = block.float()
    wide = block.to(torch.float64, copy=True)
    raw = block if block.is_floating_point() else wide
    single = torch.empty(block.shape)
    found = {
        LOW: along(torch.amin, raw),
        HIGH: along(torch.amax, raw),
        ZEROS: along(torch.sum, torch.eq(raw, 0, out=single)),
    }
    if bounds is not None:
        outside = (wide <= bounds[0]) | (wide >= bounds[1])
        found[SATURATED] = along(torch.sum, single.copy_(outside))
    wide -= shift
    found[S1] = along(torch.sum, wide)
    found[S2] = along(torch.sum, wide.square_())
    numbers = nothing(block.shape[1])
    for row, tensor in found.items():
        numbers[row] = tensor.numpy()
    return numbers


def nonfinite(values: Tensor) -> Array:
    """(filters,) int64: how many are NaN or infinite."""
    count = np.zeros(values.shape[1], np.int64)
    for first, block in blocks(values, block_size(values.device)):
        count[first : first + block.shape[1]] += along(torch.sum, ~block.isfinite()).numpy()
    return count
