"""Draw explanations with matplotlib (extra: `plot`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch import Tensor

from fmapkit.errors import ArgumentError
from fmapkit.plot import new_figure, spread_pixels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BOX = "#e4572e"


class DrawnField(Protocol):
    """What each location of a map sees; `ReceptiveField` is one."""

    @property
    def layer(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def input_shape(self) -> tuple[int, ...]: ...

    def box(self, *location: int) -> Any: ...


def plot_field(
    field: DrawnField,
    location: tuple[int, ...],
    *,
    image: Any = None,
    effective: Tensor | None = None,
) -> Figure:
    """Draw the field of a location as a box on the image; with `effective`, the heat map in it too.

    Args:
        field: of a map over an image, or a sequence.
        location: row and column in the map, or position; empty for the middle.
        image: a tensor or array (H, W), (1, H, W) or (3, H, W), in any range.
        effective: what `effective_field` gives for the same location.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
        ArgumentError: the input is no image, or there is no such location.
    """
    if len(field.input_shape) != 2:
        raise ArgumentError(
            f"a field is drawn on an image, and this input has locations {field.input_shape}"
        )
    location = location or tuple(n // 2 for n in field.shape)
    box = field.box(*location)
    figure, panes = _panes(1 if effective is None else 2, 4.4)
    from matplotlib.patches import Rectangle

    shown = np.zeros(field.input_shape) if image is None else spread_pixels(image)[0]
    for pane in panes:
        pane.imshow(shown, cmap="gray", extent=_extent(field.input_shape), interpolation="nearest")
        corner, size = (box.left, box.top), (box.right - box.left, box.bottom - box.top)
        pane.add_patch(Rectangle(corner, *size, fill=False, edgecolor=_BOX, linewidth=1.8))
    name = field.layer or "(model)"
    panes[0].set_title(
        f"{name} {location}: rows {box.top}–{box.bottom}, columns {box.left}–{box.right}",
        fontsize="medium",
    )
    if effective is not None:
        _overlay(panes[1], effective, field.input_shape, signed=False)
        panes[1].set_title("effective field", fontsize="medium")
    return figure


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
    figure, panes = _panes(1 if image is None else 2, 4.2)
    extent_of = tuple(heat.shape)
    if image is not None:
        shown = spread_pixels(image)[0]
        extent_of = shown.shape[:2]
        for pane in panes:
            pane.imshow(shown, cmap="gray", extent=_extent(extent_of), interpolation="nearest")
    drawn = _overlay(panes[-1], heat, extent_of, signed=True, opaque=image is None)
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
    figure, panes = _panes(1 if image is None else 2, 4.2)
    if image is not None:
        panes[0].imshow(spread_pixels(image)[0], cmap="gray", interpolation="nearest")
    scale: dict[str, Any] = {"cmap": "gray", "vmin": 0.0, "vmax": 1.0}
    panes[-1].imshow(
        shown[:, :, 0] if shown.shape[2] == 1 else shown, interpolation="nearest", **scale
    )
    figure.suptitle(title, fontsize="medium")
    return figure


def _overlay(
    pane: Axes, heat: Tensor, shape: tuple[int, ...], *, signed: bool, opaque: bool = False
) -> Any:
    values = heat.detach().double().cpu().numpy()
    reach = float(np.abs(values[np.isfinite(values)]).max(initial=0.0)) or 1.0
    low, colours = (-reach, "RdBu_r") if signed else (0.0, "magma")
    strength = 1.0 if opaque else np.clip(np.nan_to_num(np.abs(values)) / reach, 0, 1) ** 0.5 * 0.85
    return pane.imshow(
        values, cmap=colours, vmin=low, vmax=reach, alpha=strength, extent=_extent(shape)
    )


def _extent(shape: tuple[int, ...]) -> tuple[float, float, float, float]:
    """So that pixel i lies from i to i + 1, as in a box."""
    return 0, shape[1], shape[0], 0


def _panes(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of some panes in a row, without ticks."""
    figure = new_figure(4.2 * count, height)
    panes: list[Axes] = list(figure.subplots(1, count, squeeze=False)[0])
    for pane in panes:
        pane.set_xticks([])
        pane.set_yticks([])
    return figure, panes
