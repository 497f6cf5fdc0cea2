"""`LayerStatistics`: what `Statistics` knows of one layer's maps of one kind, to read."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fmapkit.analysis._keys import Name
from fmapkit.analysis._moments import NONFINITE, SATURATED, ZERO, Moments
from fmapkit.analysis._tables import Table

__all__ = ["LayerStatistics"]

_ROWS = 16  # filters that a table shows


@dataclass(frozen=True, slots=True, eq=False)
class LayerStatistics:
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
    count: Tensor = field(repr=False)
    mean: Tensor = field(repr=False)
    variance: Tensor = field(repr=False)
    minimum: Tensor = field(repr=False)
    maximum: Tensor = field(repr=False)
    zero_fraction: Tensor = field(repr=False)
    saturated_fraction: Tensor = field(repr=False)
    nonfinite: Tensor = field(repr=False)
    histogram: Tensor | None = field(default=None, repr=False)
    edges: Tensor | None = field(default=None, repr=False)

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

    def __repr__(self) -> str:
        return self._table().text()

    def _repr_html_(self) -> str:
        return self._table().html()

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
        return Table(heads, rows, 0, last)


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


def summarise(
    name: Name, parts: list[tuple[tuple[int, ...] | None, Moments, bool]], edges: Tensor | None
) -> LayerStatistics:
    """What is read of one name; nothing here waits for the device.

    Args:
        name: of the maps.
        parts: the filters, their moments, and whether saturation is defined, part by part.
        edges: of the histograms, on the CPU.
    """
    columns: list[dict[str, Tensor]] = []
    for _, m, saturates in parts:
        count = m.counts.new_full((m.m2.numel(),), m.count)
        undefined = torch.full_like(m.m2, torch.nan)
        known = m.count > 0
        shares = m.counts.to(m.m2.dtype) / m.count if known else None
        column = {
            "count": count,
            "mean": m.mean if known else undefined,
            "variance": m.m2 / m.count if known else undefined,
            "minimum": m.minimum if known else undefined,
            "maximum": m.maximum if known else undefined,
            "zero_fraction": shares[ZERO] if shares is not None else undefined,
            "saturated_fraction": (
                shares[SATURATED] if shares is not None and saturates else undefined
            ),
            "nonfinite": m.counts[NONFINITE],
        }
        if m.histogram is not None:
            column["histogram"] = m.histogram
        columns.append(column)
    filters: tuple[int, ...] | None = None
    if parts[0][0] is not None:
        filters = tuple(f for part, _, _ in parts for f in part or ())

    def joined(key: str) -> Tensor:
        return torch.cat([column[key] for column in columns])

    histogram = joined("histogram") if "histogram" in columns[0] else None
    return LayerStatistics(
        name.layer,
        name.kind,
        name.nonlinearity,
        name.path,
        filters,
        count=joined("count"),
        mean=joined("mean"),
        variance=joined("variance"),
        minimum=joined("minimum"),
        maximum=joined("maximum"),
        zero_fraction=joined("zero_fraction"),
        saturated_fraction=joined("saturated_fraction"),
        nonfinite=joined("nonfinite"),
        histogram=histogram,
        edges=edges if histogram is not None else None,
    )
