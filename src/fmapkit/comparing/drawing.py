"""The picture of a comparison: relative errors in execution order, on a logarithmic scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fmapkit.errors import ArgumentError
from fmapkit.kinds import KINDS
from fmapkit.plot import axes_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fmapkit.comparing.difference import Difference

_MARKS = dict(zip(KINDS, ("v", "s", "o", "^", "D", "P"), strict=True))
_NAMES = 40  # of layers that are written below the axis


def draw(
    rows: Sequence[Difference],
    first: Difference | None,
    ax: Axes | None,
    gradients: bool,
    title: str | None,
) -> Figure:
    """Draw the differences, if there are any."""
    if not rows:
        raise ArgumentError("nothing to plot: no map was compared")
    figure, ax = axes_of(ax, 10, 4.2)
    shown = [d.relative for d in rows if 0 < d.relative < math.inf]
    tolerances = [d.tolerance for d in rows if d.tolerance > 0]
    # A map that is equal lies on the floor, one that is not finite on the ceiling.
    floor = min([*shown, *tolerances, 1e-7]) / 10
    ceiling = max([*shown, *tolerances, 1e-6]) * 10
    heights = [min(max(d.relative, floor), ceiling) for d in rows]
    ax.set_yscale("log")
    _points(ax, rows, heights)
    ax.plot(heights, color="0.75", linewidth=0.8, zorder=1)
    ax.step(
        range(len(rows)),
        [max(d.tolerance, floor) for d in rows],
        where="mid",
        color="tab:red",
        linewidth=1,
        linestyle="--",
        label="tolerance",
    )
    if first is not None:
        place = next(i for i, d in enumerate(rows) if d is first)
        ax.axvline(place, color="tab:red", linewidth=0.8, alpha=0.5)
        ax.annotate(
            f"first beyond: {(first.layer + first.path) or '(model)'}, {first.kind}",
            (place, heights[place]),
            xytext=(6, 8),
            textcoords="offset points",
            fontsize="small",
        )
    _label(ax, [(d.layer + d.path) or "(model)" for d in rows])
    ax.set_ylim(floor / 2, ceiling * 2)
    ax.set_ylabel("‖a − b‖ / ‖a‖" + (" of gradients" if gradients else ""))
    if any(d.equal for d in rows):
        ax.plot([], [], "o", color="0.4", markerfacecolor="white", markersize=5, label="equal")
    ax.legend(fontsize="small", loc="best")
    ax.spines[["top", "right"]].set_visible(False)
    if title:
        ax.set_title(title)
    return figure


def _points(ax: Axes, rows: Sequence[Difference], heights: Sequence[float]) -> None:
    """A mark for each map, by kind; hollow where every value is the same: this scale has no 0."""
    for kind in dict.fromkeys(d.kind for d in rows):
        mine = [i for i, d in enumerate(rows) if d.kind == kind]
        ax.plot(
            *(mine, [heights[i] for i in mine], _MARKS[kind]), markersize=5, label=kind, zorder=3
        )
        equal = [i for i in mine if rows[i].equal]
        ax.plot(
            *(equal, [heights[i] for i in equal], _MARKS[kind]),
            markersize=3.5,
            color="white",
            zorder=4,
        )


def _label(ax: Axes, names: list[str]) -> None:
    """Write each layer's name once, below its first map; every n-th one where there are many."""
    at = [i for i, name in enumerate(names) if not i or names[i - 1] != name]
    at = at[:: max(1, -(-len(at) // _NAMES))]
    ax.set_xticks(at, [names[i] for i in at], rotation=60, ha="right", fontsize="x-small")
    ax.set_xlim(-0.8, len(names) - 0.2)
