"""Count, mean, variance, extremes, zeros and histogram of one map, filter by filter, and merging.

Pure functions of tensors. Nothing here depends on a value on the host, so nothing waits for the
device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmapkit.analysis._bins import Edges, placed
from fmapkit.analysis._blocks import at_hand, block_size, blockwise, chan
from fmapkit.analysis._of_map import of_map

ZERO, NONFINITE, SATURATED = range(3)  # rows of `Moments.counts`
_FAR = (
    100.0  # times the variance: sums around 0 lose two digits of the variance to the mean's square
)


@dataclass(frozen=True, slots=True)
class Moments:
    """What is known of some values of each of C filters.

    Attributes:
        count: values of each filter.
        shift: (C,), float64 where the device has it, else float32; so the next four. A value near
            the others, finite; it never changes.
        offset: (C,), mean - shift. Far from 0 the mean's last digit is coarse beside the spread of
            the values, and differences of means would be too.
        m2: (C,), the sum of (x - mean)².
        minimum: (C,); +inf of no value.
        maximum: (C,); -inf of no value.
        counts: (3, C) int64: values that are zero, that are NaN or infinite, that are saturated.
        histogram: (C, edges + 1) int64, or None.
    """

    count: int
    shift: Tensor
    offset: Tensor
    m2: Tensor
    minimum: Tensor
    maximum: Tensor
    counts: Tensor
    histogram: Tensor | None = None

    @staticmethod
    def of(count: int, state: Sequence[Tensor], histogram: Tensor | None = None) -> Moments:
        """From shift, offset, m2, minimum, maximum and counts."""
        shift, offset, m2, minimum, maximum, counts = state
        return Moments(count, shift, offset, m2, minimum, maximum, counts, histogram)

    @property
    def state(self) -> tuple[Tensor, ...]:
        """Shift, offset, m2, minimum, maximum and counts."""
        return self.shift, self.offset, self.m2, self.minimum, self.maximum, self.counts

    @property
    def mean(self) -> Tensor:
        """(C,)."""
        return self.shift + self.offset

    @property
    def device(self) -> torch.device:
        return self.m2.device

    def on(self, device: torch.device) -> Moments:
        if self.device == device:
            return self
        return Moments(self.count, **{k: placed(t, device) for k, t in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        found = {field.name: getattr(self, field.name) for field in fields(self)[1:]}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def merge(self, other: Moments) -> Moments:
        """The moments of the values of both; neither is changed."""
        if not other.count:
            return self
        if not self.count:
            return other
        n, m = self.count, other.count
        if self.device.type == "cpu":  # NumPy takes half a microsecond, and torch one or two
            ours, theirs = ([t.numpy() for t in one.state] for one in (self, other))
            with np.errstate(all="ignore"):
                after = tuple(map(torch.from_numpy, chan(np, n, ours, m, theirs)))
        else:
            after = chan(torch, n, self.state, m, other.state)
        histogram = None
        if self.histogram is not None and other.histogram is not None:
            histogram = self.histogram + other.histogram
        return Moments.of(n + m, after, histogram)


def accumulator(device: torch.device) -> torch.dtype:
    """The widest float that the device has."""
    return torch.float32 if device.type == "mps" else torch.float64


def by_filter(tensor: Tensor, dim: int | None) -> Tensor:
    """The values as (outer, filters, inner), in the order of memory: a view wherever there is one.

    Args:
        dim: the filter axis; None: all values belong to one.
    """
    if dim is None:
        tensor, dim = tensor.unsqueeze(0), 0
    dim %= tensor.dim()
    count, size, strides = tensor.shape[dim], tensor.numel(), tensor.stride()
    if not size:
        return tensor.new_empty(0, count, 0)
    if count > 1 and tensor.is_contiguous():
        return tensor.view(math.prod(tensor.shape[:dim]), count, -1)
    kept = [d for d in range(tensor.dim()) if tensor.shape[d] > 1 or d == dim]
    if count == 1:  # it may stand anywhere: first, so that the rest is one row
        kept = [dim, *(d for d in kept if d != dim)]
        order = [dim, *sorted(kept[1:], key=lambda d: -strides[d])]
    else:
        order = sorted(kept, key=lambda d: -strides[d])
    outer = math.prod(tensor.shape[d] for d in order[: order.index(dim)])
    dropped = [d for d in range(tensor.dim()) if d not in kept]
    return tensor.permute(*order, *dropped).reshape(outer, count, size // (outer * count))


def _empty(filters: int, device: torch.device, edges: Edges | None) -> Moments:
    """Moments of no value."""
    kind = accumulator(device)
    zeros = torch.zeros(filters, dtype=kind, device=device)
    limit = torch.full((filters,), torch.inf, dtype=kind, device=device)
    counts = torch.zeros(3, filters, dtype=torch.int64, device=device)
    histogram = None if edges is None else counts.new_zeros(filters, edges.columns)
    return Moments(0, zeros, zeros, zeros, limit, -limit, counts, histogram)


def moments(
    values: Tensor,
    bounds: tuple[float, float] | None = None,
    edges: Edges | None = None,
    before: Moments | None = None,
) -> Moments:
    """The moments of one map.

    Args:
        values: (outer, filters, inner), real, integer or bool.
        edges: of the histogram; NaN falls in none of its columns.
        before: of maps that came before: what to expect of this one.
    """
    outer, filters, inner = values.shape
    if not values.numel():
        return _empty(filters, values.device, edges)
    kind = accumulator(values.device)
    if at_hand(values.device) and kind == torch.float64:
        state = of_map(values.resolve_neg(), bounds, None if before is None else _far(before))
    else:
        state = blockwise(values, kind, bounds)
    histogram = None if edges is None else _histogram(values, edges)
    return Moments.of(outer * inner, state, histogram)


def _far(before: Moments) -> np.ndarray[Any, Any] | None:
    """The mean of each filter that is far from 0 beside its spread, else 0; None: none is."""
    mean, m2 = before.shift.numpy() + before.offset.numpy(), before.m2.numpy()
    with np.errstate(all="ignore"):  # of infinite values m2 is no number, nor more than any
        far = mean * mean * before.count > _FAR * m2
    return np.where(far, mean, 0) if far.any() else None


def absorb(
    values: Tensor, bounds: tuple[float, float] | None, seen: int, *state: Tensor
) -> tuple[Tensor, ...]:
    """`Moments.merge` with a map as one expression for a compiler to fuse, histogram apart.

    Values are summed up shifted by one of them; in float32, where digits are few, by the mean. As
    the pilot p is one of n values, (p - mean)² <= M2, and so S1²/n <= n·M2: S2 - S1²/n loses a
    factor of n at worst, 1e-10 of M2 for 10^6 values in float64, whatever scale and offset.

    Args:
        seen: values of each filter that the state knows.
        state: shift, offset, m2, minimum, maximum, counts.

    Returns:
        The state after it.
    """
    count, over, kind = values.shape[0] * values.shape[2], (0, 2), state[0].dtype
    wide = values.to(kind)
    pilot = wide[0, :, 0]
    if kind == torch.float32:
        pilot = pilot + (wide - pilot[:, None]).mean(over)
    pilot = torch.nan_to_num(pilot, 0.0, 0.0, 0.0)
    shifted = wide - pilot[:, None]
    s1, s2 = shifted.sum(over), (shifted * shifted).sum(over)
    offset = s1 / count
    m2 = (s2 - s1 * offset).clamp_min(0)
    zeros, bad = (values == 0).sum(over), (~wide.isfinite()).sum(over)
    saturated = torch.zeros_like(zeros)
    if bounds is not None:
        saturated = ((wide <= bounds[0]) | (wide >= bounds[1])).sum(over)
    counts = torch.stack([zeros, bad, saturated])
    found = (pilot, offset, m2, wide.amin(over), wide.amax(over), counts)
    return chan(torch, seen, state, count, found)


def fused(
    a: Moments,
    values: Tensor,
    bounds: tuple[float, float] | None,
    edges: Edges | None,
    compiled: Callable[..., tuple[Tensor, ...]],
) -> Moments:
    """`a.merge(moments(values))` by `absorb`, compiled."""
    after = (a.shift, *compiled(values, bounds, a.count, *a.state)[1:])
    histogram = a.histogram
    if edges is not None and histogram is not None:
        histogram = histogram + _histogram(values, edges)
    return Moments.of(a.count + values.shape[0] * values.shape[2], after, histogram)


def _histogram(values: Tensor, edges: Edges) -> Tensor:
    """(C, edges + 1) int64; block by block, as the place of each value takes 8 bytes."""
    outer, filters, inner = values.shape
    width = edges.columns + 1  # the last column is for NaN, and is dropped
    counts = torch.zeros(filters * width, dtype=torch.int64, device=values.device)
    first = torch.arange(filters, device=values.device)[:, None] * width
    one = torch.ones((), dtype=torch.int64, device=values.device)
    size = block_size(values.device)
    step = max(1, size // (filters * inner))
    for o in range(0, outer, step):
        wide = values[o : o + step].to(accumulator(values.device))
        place = torch.where(wide.isnan(), width - 1, edges.column_of(wide)).add_(first).flatten()
        counts.scatter_add_(0, place, one.expand_as(place))
    return counts.view(filters, width)[:, :-1]
