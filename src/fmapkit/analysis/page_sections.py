"""What a page draws of statistics and of firings: a section for each layer."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from fmapkit.analysis.dead_plot import STATES, states
from fmapkit.analysis.firings import LayerFirings
from fmapkit.analysis.summary import LayerStatistics
from fmapkit.page import Fact, Panel, Section, number_panel


def _labels(s: LayerStatistics | LayerFirings) -> tuple[int, ...]:
    return s.filters if s.filters is not None else tuple(range(len(s)))


def statistics_section(s: LayerStatistics) -> Section:
    """Mean and std of each filter, and its histogram where there is one."""
    labels = _labels(s)
    numbers = {
        "mean": s.mean,
        "std": s.std,
        "min": s.minimum,
        "max": s.maximum,
        "share of zeros": s.zero_fraction,
        "share saturated": s.saturated_fraction,
        "NaN or infinite": s.nonfinite,
    }
    facts: dict[str, Fact] = {name: (name, t.tolist()) for name, t in numbers.items()}
    note = f"{len(s)} filters" if s.filters is not None else "all values together"
    panels: list[Panel] = []
    for name in ("mean", "std"):
        values = numbers[name].double().cpu().numpy()[:, None, None]
        first = (facts[name], *(f for other, f in facts.items() if other != name))
        panels.append(
            number_panel(name, note, labels, values, "cell", signed=name == "mean", facts=first)
        )
    if s.histogram is not None and s.edges is not None:
        counts = s.histogram.double().cpu()
        shares = (counts / counts.sum(1, keepdim=True).clamp(min=1)).numpy()[:, None, :]
        panels.append(
            number_panel(
                "histogram",
                f"{note}, share of values in each of {shares.shape[2]} bins",
                labels,
                shares,
                "row",
                signed=False,
                facts=tuple(facts.values()),
                size=(1, shares.shape[2]),
                axis="bin",
                places=_bins(s.edges.tolist()),
            )
        )
    tags = [s.kind, *([f"σ = {s.nonlinearity}"] if s.nonlinearity else [])]
    return Section((s.layer or "(model)") + s.path, " · ".join(tags), tuple(panels))


def _bins(edges: list[float]) -> tuple[str, ...]:
    between = (f"{a:g} to {b:g}" for a, b in pairwise(edges))
    return (f"below {edges[0]:g}", *between, f"{edges[-1]:g} and above")


def firings_section(s: LayerFirings) -> Section:
    """When each filter fired."""
    silent: Any = (s.inputs - s.last_input).tolist()
    picture = np.asarray(states(s))
    facts: tuple[Fact, ...] = (
        ("inputs since it fired", silent),
        ("revivals", s.revivals.tolist()),
    )
    spans = picture.shape[1]
    panel = Panel(
        "fired",
        f"{int(s.dead.sum())} of {len(s)} filters dead, by {s.rule}",
        _labels(s),
        picture[:, None, :].astype(np.uint8),
        "row",
        "states",
        facts,
        words=STATES,
        size=(1, spans),
        axis="inputs",
        places=tuple(f"{i * s.span} to {(i + 1) * s.span - 1}" for i in range(spans)),
    )
    tags = f"σ = {s.nonlinearity}" if s.nonlinearity else ""
    return Section((s.layer or "(model)") + s.path, tags, (panel,))
