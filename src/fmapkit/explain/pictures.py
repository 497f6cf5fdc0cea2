"""Draw explanations with matplotlib (extra: `plot`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from fmapkit.errors import ArgumentError
from fmapkit.plot import new_figure, spread_pixels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_heat(heat: Tensor, image: Any = None, *, title: str = "") -> Figure:
    """Draw a heat map (H, W), over an image where there is one: red for what speaks for the map.

    Args:
        heat: a number for each location; it is stretched over the image.
        image: a tensor or array (H, W), (1, H, W) or (3, H, W), in any range.
        title: stands above.

    Raises:
        ImportError: matplotlib is not installed.
        ArgumentError: the heat map is not of two axes.
    """
    if heat.dim() != 2:
        raise ArgumentError(f"a heat map has two axes, and this one has shape {tuple(heat.shape)}")
    figure, panes = side_by_side(1 if image is None else 2, 4.2)
    extent_of = tuple(heat.shape)
    if image is not None:
        shown = spread_pixels(image)[0]
        extent_of = shown.shape[:2]
        for pane in panes:
            pane.imshow(shown, cmap="gray", extent=extent(extent_of), interpolation="nearest")
    drawn = overlay(panes[-1], heat, extent_of, signed=True, opaque=image is None)
    figure.colorbar(drawn, ax=panes[-1], fraction=0.046, pad=0.02)
    figure.suptitle(title, fontsize="medium")
    return figure


def plot_projection(projection: Tensor, image: Any = None, *, title: str = "") -> Figure:
    """Draw a projection as an image of its own, grey where it is 0, beside what it is of.

    Args:
        projection: of one sample, (C, H, W), as `project` gives it.
        image: a tensor or array (H, W), (1, H, W) or (3, H, W), in any range.
        title: stands above.

    Raises:
        ImportError: matplotlib is not installed.
        ArgumentError: the projection is not to an image.
    """
    if projection.dim() != 3 or projection.shape[0] not in (1, 3):
        raise ArgumentError(
            f"a projection to an image has shape (1, H, W) or (3, H, W), not "
            f"{tuple(projection.shape)}: take one sample of it"
        )
    values = projection.detach().double().cpu().numpy()
    reach = float(np.abs(values).max()) or 1.0
    shown = values.transpose(1, 2, 0) / (2 * reach) + 0.5
    figure, panes = side_by_side(1 if image is None else 2, 4.2)
    if image is not None:
        panes[0].imshow(spread_pixels(image)[0], cmap="gray", interpolation="nearest")
    scale: dict[str, Any] = {"cmap": "gray", "vmin": 0.0, "vmax": 1.0}
    panes[-1].imshow(
        shown[:, :, 0] if shown.shape[2] == 1 else shown, interpolation="nearest", **scale
    )
    figure.suptitle(title, fontsize="medium")
    return figure


def overlay(
    pane: Axes, heat: Tensor, shape: tuple[int, ...], *, signed: bool, opaque: bool = False
) -> Any:
    values = heat.detach().double().cpu().numpy()
    reach = float(np.abs(values[np.isfinite(values)]).max(initial=0.0)) or 1.0
    low, colours = (-reach, "RdBu_r") if signed else (0.0, "magma")
    strength = 1.0 if opaque else np.clip(np.nan_to_num(np.abs(values)) / reach, 0, 1) ** 0.5 * 0.85
    return pane.imshow(
        values, cmap=colours, vmin=low, vmax=reach, alpha=strength, extent=extent(shape)
    )


def extent(shape: tuple[int, ...]) -> tuple[float, float, float, float]:
    """So that pixel i lies from i to i + 1, as in a box."""
    return 0, shape[1], shape[0], 0


def side_by_side(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of some panes in a row, without ticks."""
    figure = new_figure(4.2 * count, height)
    panes: list[Axes] = list(figure.subplots(1, count, squeeze=False)[0])
    for pane in panes:
        pane.set_xticks([])
        pane.set_yticks([])
    return figure, panes
