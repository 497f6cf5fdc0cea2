"""Draw how alike layers are (extra: `plot`); what `Similarity.plot()` calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fmapkit.plot import axes_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NUMBERED = 12  # rows up to which each cell has its figure


def plot_similarity(
    values: np.ndarray[Any, Any],
    layers: tuple[list[str], list[str]],
    ax: Axes | None,
    *,
    measure: str,
    title: str | None,
) -> Figure:
    """Draw the matrix of a measure.

    Args:
        values: (rows, columns).
        layers: the names of the rows, and of the columns.
    """
    rows, columns = layers
    width, height = np.clip([2.5 + 0.45 * len(columns), 1.6 + 0.4 * len(rows)], [4, 3], 14)
    figure, ax = axes_of(ax, float(width), float(height))
    low = 0.0 if np.nanmin(values, initial=0.0) >= 0 or measure == "cka" else -1.0
    drawn = ax.imshow(values, cmap="magma", vmin=low, vmax=1, interpolation="nearest")
    ax.set_xticks(range(len(columns)), columns, rotation=40, ha="right")
    ax.set_yticks(range(len(rows)), rows)
    ax.tick_params(labelsize="small")
    if max(values.shape) <= _NUMBERED:
        for (i, j), value in np.ndenumerate(values):
            colour = "black" if value > (1 + low) / 2 else "white"
            ax.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize="small", color=colour)
    ax.set_title(title or ("linear CKA" if measure == "cka" else "RSA"), fontsize="medium")
    figure.colorbar(drawn, ax=ax, fraction=0.04, pad=0.02)
    return figure
