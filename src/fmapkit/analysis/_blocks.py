"""Mean, variance, extremes and counts of many values on any device, filter by filter, in blocks.

Nothing here depends on a value on the host, so nothing waits for the device. Each result is one
reduction that reads the block once: the device does not compute faster for reading less, but every
copy in memory is written and read again. In bytes of memory for each value of float32, where a read
is 4: 12 for the float64 copy, 8 for mean and variance together, 4 for both extremes (8 but on CUDA),
4 for the zeros, 12 for what is not finite: 40 in all. **None of it has been measured on a GPU.**
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["along", "block_size", "blockwise"]

# Values that are worked on at a time: on a CPU what stays in its cache; elsewhere it bounds the
# memory that copies take, and a sum of so many ones is still exact in float32.
_BLOCK = {"cpu": 2**18}
_BLOCK_ELSEWHERE = 2**24
_LONG = 128  # rows of so many values are gone through along themselves first, shorter ones across

Part = tuple[Tensor, ...]


def block_size(device: torch.device) -> int:
    """How many values to work on at a time."""
    size = _BLOCK.get(device.type)
    # Each thread works on its share of a block, in a cache of its own.
    return _BLOCK_ELSEWHERE if size is None else size * min(torch.get_num_threads(), 16)


def blockwise(
    values: Tensor, kind: torch.dtype, bounds: tuple[float, float] | None
) -> tuple[Tensor, ...]:
    """Shift, offset, m2, minimum, maximum and counts, as `Moments` has them.

    Args:
        values: (outer, filters, inner), real, integer or bool, at least one of each filter.
        kind: the type to work in.
        bounds: at or below the first and at or above the second a value is saturated.
    """
    size = block_size(values.device)
    step = min(values.shape[1], max(1, size // values.shape[2]))
    strips = [
        _together([_of_block(b, kind, bounds) for b in _blocks(strip, size)])
        for strip in values.split(step, 1)
    ]
    mean, m2, low, high, *counts = (torch.cat(column) for column in zip(*strips, strict=True))
    # The mean of what is infinite is so too, or not a number where both infinities are.
    infinite = torch.where(high == torch.inf, high, 0) + torch.where(low == -torch.inf, low, 0)
    mean = torch.where(infinite == 0, mean, infinite)
    shift = torch.nan_to_num(mean, 0.0, 0.0, 0.0)
    offset = torch.where(infinite.isfinite() & mean.isfinite(), 0, mean)
    return shift, offset, m2, low, high, torch.stack(counts)


def _blocks(values: Tensor, size: int) -> Iterator[Tensor]:
    outer, filters, inner = values.shape
    if inner > size:  # one filter: the others were set apart before
        for row in values.split(1):
            yield from row.split(size, 2)
        return
    yield from values.split(max(1, size // (filters * inner)))


def _of_block(block: Tensor, kind: torch.dtype, bounds: tuple[float, float] | None) -> Part:
    """How many values a filter has; mean, m2, minimum, maximum, zeros, nonfinite and saturated."""
    count = block.shape[0] * block.shape[2]
    over = (0, 2)
    wide = block.to(kind)  # a copy, but of `kind` itself
    raw = block if block.is_floating_point() else wide
    variance, mean = torch.var_mean(wide, over, correction=0)
    low, high = _extremes(raw)
    zeros = count - _nonzero(raw)
    nonfinite = _nonzero(raw * 0)  # NaN there
    saturated = torch.zeros_like(zeros)
    if bounds is not None:
        single = raw if raw.dtype == kind else raw.float()  # nearer to what was written
        beyond = (single <= bounds[0]) | (single >= bounds[1])
        saturated = along(torch.sum, beyond)
    return (
        *(torch.tensor(count), mean, variance * count, low.to(kind), high.to(kind)),
        *(zeros, nonfinite, saturated),
    )


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
    return torch.linalg.vector_norm(raw, 0, (0, 2), dtype=kind).to(torch.int64)


def _together(parts: list[Part]) -> Part:
    """Mean, m2 and the rest of the same filters over several blocks; without their count."""
    if len(parts) == 1:
        return parts[0][1:]
    sizes, mean, m2, low, high, *counts = (torch.stack(c) for c in zip(*parts, strict=True))
    share = (sizes / sizes.sum()).to(mean.device, mean.dtype)[:, None]
    centre = (mean * share).sum(0)
    # From one of the means: far from 0, their weighted sum has lost digits.
    near = mean[0] + ((mean - mean[0]) * share).sum(0)
    apart = (mean - near).square() * share * sizes.sum()
    del centre
    return (
        *(near, m2.sum(0) + apart.sum(0), low.amin(0), high.amax(0)),
        *(c.sum(0) for c in counts),
    )


def along(op: Any, block: Tensor) -> Tensor:
    """A reduction to (C,), in the order of axes that keeps the inner loop long."""
    first, last = (2, 0) if block.shape[2] >= _LONG or block.shape[0] == 1 else (0, 1)
    reduced: Tensor = op(block, first)
    if reduced.shape[last] == 1:
        return reduced.squeeze(last)
    whole: Tensor = op(reduced, last)
    return whole
