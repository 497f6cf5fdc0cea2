"""What is read of one layer: `LayerStatistics` of `Statistics`, `LayerFirings` of `DeadFilters`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fmapkit.analysis._moments import NONFINITE, SATURATED, ZERO, Moments
from fmapkit.tables import Shown, Table

_ROWS = 16  # filters that a table shows


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class LayerStatistics(Shown):
    """Statistics of one layer's maps of one kind: tensors of shape (filters,) on the maps' device.

    Of a map without a filter axis: of shape (1,), for all its values.

    Attributes:
        layer: its qualified name.
        kind: of the maps.
        nonlinearity: σ; None where there is none.
        path: place in a nested output; else "".
        filters: the filters that the values belong to, in order; None without a filter axis.
        count: values seen, int64.
        mean: of the values; NaN of none. Like variance, minimum and maximum, NaN where a value is.
        variance: of the population: the mean of (x - mean)².
        minimum: the least value.
        maximum: the greatest value.
        zero_fraction: share of values that are 0 (or -0).
        saturated_fraction: share of values at σ's bounds; NaN where it has none.
        nonfinite: values that are NaN or infinite, int64.
        histogram: (filters, len(edges) + 1) int64, or None. Column i counts the values x with
            edges[i - 1] <= x < edges[i]; the first one those below all edges, the last one those at
            or above the last edge. NaN is in none.
        edges: of the histogram, or None.
    """

    layer: str
    kind: str
    nonlinearity: str | None
    path: str
    filters: tuple[int, ...] | None
    count: Tensor
    mean: Tensor
    variance: Tensor
    minimum: Tensor
    maximum: Tensor
    zero_fraction: Tensor
    saturated_fraction: Tensor
    nonfinite: Tensor
    histogram: Tensor | None = None
    edges: Tensor | None = None

    @property
    def std(self) -> Tensor:
        """Square root of the variance."""
        return self.variance.sqrt()

    def overall(self) -> LayerStatistics:
        """One value for all filters together."""
        total = self.count.sum()
        # Of no value nothing is known, and 0·NaN would hide the filters that have some.
        seen = self.count > 0
        mean = torch.where(seen, self.mean * self.count, 0).sum() / total
        m2 = torch.where(seen, (self.variance + (self.mean - mean).square()) * self.count, 0).sum()
        zero, saturated = (
            torch.where(seen, share * self.count, 0).sum() / total
            for share in (self.zero_fraction, self.saturated_fraction)
        )
        low = torch.where(seen, self.minimum, torch.inf).amin()
        high = torch.where(seen, self.maximum, -torch.inf).amax()
        low, high = (torch.where(total > 0, v, torch.nan) for v in (low, high))
        figures = (total, mean, m2 / total, low, high, zero, saturated, self.nonfinite.sum())
        tags = (self.layer, self.kind, self.nonlinearity, self.path, None)
        return LayerStatistics(*tags, *(v.reshape(1) for v in figures))

    def __len__(self) -> int:
        """Number of filters; 1 without a filter axis."""
        return self.count.numel()

    def _table(self) -> Table:
        names = self.filters if self.filters is not None else ("all",)
        rows = [
            (str(names[i]), *cells)
            for i, cells in enumerate(zip(*_columns(self, _ROWS), strict=True))
        ]
        heads = ("filter", *_HEADS)
        more = f", {len(self) - _ROWS} more filters" if len(self) > _ROWS else ""
        sigma = f", σ={self.nonlinearity}" if self.nonlinearity else ""
        last = f"LayerStatistics: {self.layer + self.path!r}, {self.kind}{sigma}{more}"
        return Table(heads, rows, range(len(heads)), last)


_HEADS = ("values", "mean", "std", "min", "max", "zero", "saturated", "non-finite")


def _columns(s: LayerStatistics, limit: int) -> list[list[str]]:
    """The cells of each column, filter by filter; waits for the device."""
    numbers = [t[:limit].tolist() for t in (s.mean, s.std, s.minimum, s.maximum)]
    shares = [t[:limit].tolist() for t in (s.zero_fraction, s.saturated_fraction)]
    return [
        [str(n) for n in s.count[:limit].tolist()],
        *([f"{v:.4g}" for v in column] for column in numbers),
        *(["–" if v != v else f"{v:.1%}" for v in column] for column in shares),
        [str(n) for n in s.nonfinite[:limit].tolist()],
    ]


def values_of(m: Moments, saturates: bool) -> dict[str, Tensor]:
    """One part's values, by the attributes of `LayerStatistics`; of no value, NaN.

    Nothing here waits for the device.
    """
    undefined = torch.full_like(m.m2, torch.nan)
    known = m.count > 0
    shares = m.counts.to(m.m2.dtype) / m.count if known else undefined.expand(m.counts.shape)
    column = {
        "count": m.counts.new_full((m.m2.numel(),), m.count),
        "mean": m.mean if known else undefined,
        "variance": m.m2 / m.count if known else undefined,
        "minimum": m.minimum if known else undefined,
        "maximum": m.maximum if known else undefined,
        "zero_fraction": shares[ZERO],
        "saturated_fraction": shares[SATURATED] if saturates else undefined,
        "nonfinite": m.counts[NONFINITE],
    }
    return column if m.histogram is None else {**column, "histogram": m.histogram}


# -- firings ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class LayerFirings(Shown):
    """When the filters of one layer last fired: tensors of shape (filters,) on the maps' device.

    Attributes:
        layer: its qualified name.
        nonlinearity: σ; None where its name is not known.
        path: place in a nested output; else "".
        filters: the filters that the values belong to, in order; None without a filter axis.
        rule: "zeros" or "saturation": what a filter that does not fire gives.
        after: for so many inputs a filter has to be silent to be dead.
        inputs: how many went through the layer, int64.
        last_input: how many had gone through it when the filter last fired, int64; 0: it never has.
        last_step: the map's step at that time, int64; -1: it never fired.
        revivals: how often it fired again after it had been dead, int64.
        history: (spans, filters) bool: whether it fired in each span of inputs.
        span: inputs of one span of `history`; those that have not come yet are False.
    """

    layer: str
    nonlinearity: str | None
    path: str
    filters: tuple[int, ...] | None
    rule: str
    after: int
    inputs: Tensor
    last_input: Tensor
    last_step: Tensor
    revivals: Tensor
    history: Tensor
    span: int = 1

    @property
    def dead(self) -> Tensor:
        """(filters,) bool: silent over the last `after` inputs, or more."""
        return self.inputs - self.last_input >= self.after

    @property
    def never(self) -> Tensor:
        """(filters,) bool: it has not fired since the beginning, be that long ago or not."""
        return self.last_input == 0

    @property
    def dead_filters(self) -> list[int]:
        """Which filters are dead, by the layer's own numbering; waits for the device."""
        numbers = self.filters if self.filters is not None else (0,)
        return [n for n, dead in zip(numbers, self.dead.tolist(), strict=True) if dead]

    def __len__(self) -> int:
        """Number of filters; 1 without a filter axis."""
        return self.inputs.numel()

    def _table(self) -> Table:
        found = [i for i, dead in enumerate(self.dead.tolist()) if dead]
        inputs, steps, revivals = (
            t.tolist() for t in (self.last_input, self.last_step, self.revivals)
        )
        names = self.filters if self.filters is not None else ("all",)
        rows = [
            (
                str(names[i]),
                str(inputs[i]) if inputs[i] else "the start",
                str(steps[i]) if inputs[i] else "–",
                str(revivals[i]),
            )
            for i in found[:_ROWS]
        ]
        heads = ("filter", "since input", "since step", "revivals")
        more = f", {len(found) - _ROWS} more" if len(found) > _ROWS else ""
        last = (
            f"LayerFirings: {self.layer + self.path!r}, {len(found)} of {len(self)} filters dead "
            f"after {int(self.inputs.max())} inputs (by {self.rule}){more}"
        )
        return Table(heads, rows, range(len(heads)), last)
