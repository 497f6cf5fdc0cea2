"""`Statistics`: moments, extremes, zeros, saturation and histogram of every layer's maps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fmapkit._warnings import warn
from fmapkit.analysis._bins import Edges
from fmapkit.analysis._by_layer import Held, Mergeable, Tabular
from fmapkit.analysis._keys import Filters, Name
from fmapkit.analysis._moments import Moments, absorb, by_filter, fused, moments
from fmapkit.analysis._saturation import Bounds, bounds_of, checked
from fmapkit.analysis.summary import _HEADS, LayerStatistics, _columns, values_of
from fmapkit.errors import check_flags

if TYPE_CHECKING:
    from fmapkit.maps import FeatureMap
    from fmapkit.page import Section


@dataclass(slots=True)
class _Group(Held):
    sums: Moments
    saturates: bool  # saturation has a meaning

    def state(self) -> dict[str, Any]:
        return {"count": self.sums.count, "saturates": self.saturates, **Held.state(self)}


class Statistics(Tabular[_Group, LayerStatistics], Mergeable[_Group, LayerStatistics]):
    """Running statistics of every captured layer, filter by filter; an `Analysis`.

    ```python
    stats = Statistics()
    with capture(model, analyses=[stats]):
        for images in loader:
            model(images)
    stats["layer1.0.conv1"].mean          # of the activation, one value for each filter
    stats["layer1.0.conv1", "preactivation"].std
    ```

    Maps of one layer, kind, σ and path are taken together over all passes and calls. Memory does
    not grow with the passes. `update` never waits for the device; reading a value does.

    Sums are taken in float64, on a device without it (MPS) in float32, whatever the maps' type. In
    float64, over 10^6 values of scale 1e-30 to 1e30 in any batches, they equal NumPy's of the same
    values in float64: count, extremes, fractions and histogram exactly; |mean - NumPy's| <=
    1e-12·(|mean| + std); |variance - NumPy's| <= 1e-9·variance + (1e-15·|mean|)², the last being
    NumPy's own rounding. Integers beyond 2^53 are rounded to float64. In float32, as that type has
    it: variances below 1e-38 or above 1e38 are lost.

    A NaN makes a filter's mean, variance, minimum and maximum NaN, as in NumPy, and is counted in
    `nonfinite`; fractions and histogram go on counting the others. An infinity makes the mean
    infinite and the variance NaN.

    Integers and booleans are taken as numbers. Complex, sparse, quantized and nested maps, and
    `DTensor`s that are one rank's part, are left out: a warning names the first of each layer, and
    `missed` all of them.

    A value is *saturated* at a bound of σ, or within 1% of σ's range next to an asymptote: sigmoid
    (0.01, 0.99), tanh and softsign (-0.98, 0.98), hardsigmoid (0, 1), relu6 (0, 6). Only
    activations are. For every other σ the fraction is NaN, unless `saturation` gives bounds.
    On the threshold, see `fmapkit/analysis/_saturation.py`.

    Args:
        bins: edges of a histogram, increasing. The range of maps is not known before they come, and
            finding it out would wait for the device; so edges are fixed and what is beyond them is
            counted too. "log2": powers of two from 2^-14 to 2^15 on both sides of 0, which fits any
            scale to a factor of two. None, the default: no histogram; it costs more than all the
            rest.
        saturation: bounds by σ, e.g. `{"hardtanh": (-1.0, 1.0)}`: values at or below the first and
            at or above the second count as saturated.
        compile: fuse the passes over a map by `torch.compile`. It takes seconds at the first maps,
            and pays where memory is the limit: on a GPU. Where it fails, a warning says so, and
            statistics go on without.

    Raises:
        ArgumentError: an argument is outside what is allowed.
    """

    _heads = ("layer", "kind", "σ", "filters", *_HEADS)

    def __init__(
        self,
        *,
        bins: Sequence[float] | Literal["log2"] | None = None,
        saturation: Mapping[str, Bounds] | None = None,
        compile: bool = False,
    ) -> None:
        check_flags(compile=compile)
        self._edges = Edges.of(bins)
        self._bounds = checked(saturation)
        self._compile = compile
        super().__init__("stats")

    # -- taking in -----------------------------------------------------------------------------

    def _take_in(self, fm: FeatureMap, tensor: Tensor, name: Name, filters: Filters) -> str:
        values = by_filter(tensor, fm.filter_dim if filters is not None else None)
        bounds = bounds_of(fm, self._bounds)
        groups = self._groups.names.setdefault(name, {})
        group = groups.get(filters)
        if group is None:
            first = moments(values, bounds, self._edges)
            groups[filters] = _Group(first, fm.parts is not None, bounds is not None)
            return ""
        group.sums = self._after(group.sums.on(tensor.device), values, bounds)
        group.local |= fm.parts is not None
        return ""

    def _after(self, before: Moments, values: Tensor, bounds: Bounds | None) -> Moments:
        if self._compile and before.count and values.numel():
            try:
                return fused(before, values, bounds, self._edges, _compiled())
            except Exception as error:  # of whatever backend there is, or is not
                self._compile = False
                warn(
                    "Statistics(compile=True): torch.compile failed, so statistics go on without "
                    f"it ({type(error).__name__}: {str(error).strip().splitlines()[:1]})"
                )
        return before.merge(moments(values, bounds, self._edges, before))

    # -- reading -------------------------------------------------------------------------------

    def _read(self, name: Name) -> LayerStatistics:
        filters, groups = self._groups.parts(name)
        parts = [values_of(group.sums, group.saturates) for group in groups]
        values: dict[str, Any] = {k: torch.cat([part[k] for part in parts]) for k in parts[0]}
        edges = None if self._edges is None else self._edges.tensor
        return LayerStatistics(**asdict(name), filters=filters, **values, edges=edges)

    def _page_sections(self) -> list[Section]:
        """What a page draws below the table: mean, std and histogram of each filter."""
        from fmapkit.analysis.drawn import statistics_section

        return [statistics_section(s) for s in self]

    def _row(self, s: LayerStatistics) -> tuple[str, ...]:
        count = str(len(s)) if s.filters is not None else "–"
        cells = [column[0] for column in _columns(s.overall(), 1)]
        return (s.layer + s.path, s.kind, s.nonlinearity or "", count, *cells)

    def _summary(self, rows: list[tuple[str, ...]]) -> str:
        return f"{len(rows)} kinds of map of {len(self.layers)} layers"

    # -- keeping -------------------------------------------------------------------------------

    def _options(self) -> dict[str, Any]:
        edges = None if self._edges is None else list(self._edges.edges)
        return {"bins": edges, "saturation": {k: list(v) for k, v in self._bounds.items()}}

    def _sums(self, entry: Mapping[str, Any]) -> _Group:
        found = Moments(entry["count"], **entry["tensors"])
        return _Group(found, entry["local"], entry["saturates"])


@cache
def _compiled() -> Callable[..., Any]:
    # By dynamic shapes: a map of another size should not be compiled again.
    return torch.compile(absorb, dynamic=True)
