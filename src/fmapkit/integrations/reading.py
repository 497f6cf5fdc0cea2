"""What analyses know, by name, as a log takes it: scalars, histograms and sentences."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import singledispatch
from typing import Any

import numpy as np

from fmapkit.analysis import DeadFilters, LayerStatistics, Statistics
from fmapkit.errors import ArgumentError
from fmapkit.integrations.nonfinite import FirstNonFinite


@dataclass(frozen=True, slots=True, eq=False)
class Histogram:
    """Counts between edges.

    Attributes:
        counts: int64 (bins,): values at or above an edge and below the next one.
        edges: float64 (bins + 1,), increasing; the outer ones are the extremes of the values.
        mean: of all values.
        std: of all values, of the population.
    """

    counts: np.ndarray[Any, Any]
    edges: np.ndarray[Any, Any]
    mean: float
    std: float


@dataclass(frozen=True, slots=True)
class Readings:
    """What there is to log of an analysis at some time.

    Names have two parts, such as `"activation.mean/layer1.0.conv1"`: logs group by the first.
    """

    scalars: dict[str, float] = field(default_factory=dict)
    histograms: dict[str, Histogram] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)


@singledispatch
def readings(analysis: Any) -> Readings:
    """What there is to log of an analysis; waits for the device.

    An analysis of your own is logged once there is a function for its type:

    ```python
    @readings.register
    def _(analysis: MyAnalysis) -> Readings:
        return Readings({f"mine/{layer}": value for layer, value in analysis.values.items()})
    ```

    Raises:
        ArgumentError: nothing is known of its type.
    """
    raise ArgumentError(
        f"nothing is known of what there is to log of a {type(analysis).__name__}; say it with "
        "@fmapkit.integrations.readings.register"
    )


def _name(s: Any, count: int) -> str:
    """A layer's, with σ where there are several of it."""
    return (s.layer + s.path or "(model)") + (f" {s.nonlinearity}" if count > 1 else "")


@readings.register
def _(analysis: Statistics) -> Readings:
    result = Readings()
    for s in analysis:
        name = _name(s, len(analysis.select(s.layer, s.kind, path=s.path)))
        whole = s.overall()
        values = {
            "mean": whole.mean,
            "std": whole.std,
            "min": whole.minimum,
            "max": whole.maximum,
            "zeros": whole.zero_fraction,
            "saturated": whole.saturated_fraction,
            "nonfinite": whole.nonfinite,
        }
        for what, value in values.items():
            number = float(value)
            if what == "saturated" and number != number:
                continue  # σ has no bounds
            result.scalars[f"{s.kind}.{what}/{name}"] = number
        found = _histogram(s, whole)
        if found is not None:
            result.histograms[f"{s.kind}/{name}"] = found
    return result


def _histogram(s: LayerStatistics, whole: LayerStatistics) -> Histogram | None:
    """Of all filters together, without the empty bins at its ends; None where there is none."""
    if s.histogram is None or s.edges is None:
        return None
    counts = s.histogram.sum(0).cpu()
    there = counts.nonzero().flatten()
    if not len(there):
        return None
    first, last = int(there[0]), int(there[-1])
    inner = s.edges.double().cpu().numpy()
    low = _end(float(whole.minimum), float(inner[0]), -1)
    high = _end(float(whole.maximum), float(inner[-1]), 1)
    edges = np.concatenate([[low], inner, [high]])[first : last + 2]
    return Histogram(counts[first : last + 1].numpy(), edges, float(whole.mean), float(whole.std))


def _end(extreme: float, edge: float, side: int) -> float:
    """The outer end of an outer bin: the extreme, where that is known and lies beyond the edge."""
    if math.isfinite(extreme) and (extreme - edge) * side > 0:
        return extreme
    return edge + side * max(1.0, abs(edge))


@readings.register
def _(analysis: DeadFilters) -> Readings:
    result = Readings()
    dead = filters = 0
    for s in analysis:
        name = _name(s, len(analysis.select(s.layer, path=s.path)))
        count = int(s.dead.sum())
        result.scalars[f"dead.count/{name}"] = float(count)
        result.scalars[f"dead.share/{name}"] = count / len(s)
        result.scalars[f"dead.revivals/{name}"] = float(s.revivals.sum())
        dead, filters = dead + count, filters + len(s)
    if filters:
        result.scalars["dead.count/all"] = float(dead)
        result.scalars["dead.share/all"] = dead / filters
    return result


@readings.register
def _(analysis: FirstNonFinite) -> Readings:
    found = analysis.found
    result = Readings({"nonfinite/maps": float(len(found))})
    if found:
        result.scalars["nonfinite/first_pass"] = float(found[0].step)
        result.texts["nonfinite/first"] = str(found[0])
    return result
