"""Axes of a picture with a place for each layer of φ (extra: `plot`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fmapkit.plot import axes_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def axes_by_layer(ax: Axes | None, layers: Sequence[str]) -> tuple[Figure, Axes]:
    """The figure of some axes, or a new one; the names of the layers stand below the axis."""
    count = len(layers)
    figure, ax = axes_of(ax, float(np.clip(2 + 0.7 * count, 4, 16)), 3.2)
    names = [layer or "(model)" for layer in layers]
    ax.set_xticks(range(count), names, rotation=30, ha="right")
    ax.spines[["top", "right"]].set_visible(False)
    return figure, ax
