"""Axes of a picture with a place for each layer of φ (extra: `plot`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fmapkit.plot import axes_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def figure_of(ax: Axes | None, count: int) -> tuple[Figure, Axes]:
    """The figure of some axes, or a new one for so many layers."""
    return axes_of(ax, float(np.clip(2 + 0.7 * count, 4, 16)), 3.2)


def by_layer(ax: Axes, layers: Any) -> None:
    """Write the names of layers below the axis."""
    ax.set_xticks(
        range(len(layers)), [layer or "(model)" for layer in layers], rotation=30, ha="right"
    )
    ax.spines[["top", "right"]].set_visible(False)
