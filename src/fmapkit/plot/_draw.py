"""Draw a `Picture` into axes: bars, heat rows, or tiles.

Tiles are put together as one image before they are drawn: 512 images in one figure would take
matplotlib seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fmapkit.plot._figure import axes_of
from fmapkit.plot._images import Array, stretched
from fmapkit.plot._pictures import Picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

WIDTH = 10.0  # of a figure, in inches
_STRIP = 8.0  # what labels and the colour bar leave of it
_GAP = 0.08  # between tiles, in tile widths
_SIGNED, _POSITIVE, _UNDEFINED = "RdBu_r", "magma", "0.6"
_LABELLED = 64  # tiles that have room for their numbers
_LEAST = 48  # pixels of a tile at least, so that gaps can be narrow


def columns_of(count: int, columns: int | None) -> int:
    """How many tiles stand side by side; of many, more than of few."""
    if columns is not None:
        return columns
    return 8 if count <= 16 else min(32, max(8, int(np.ceil(np.sqrt(2 * count)))))


def draw(ax: Axes, picture: Picture, columns: int) -> ScalarMappable | None:
    """Draw into axes; returns what a colour bar needs, or None where the axis has the scale."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    scale = Normalize(*picture.limits)
    colours = colormaps[_SIGNED if picture.signed else _POSITIVE].with_extremes(bad=_UNDEFINED)
    values, labels = picture.values, picture.labels

    if values.ndim == 1:
        # Of the sequential map the dark end is 0 and the light end would not show on white.
        shades = colours(scale(values)) if picture.signed else colormaps[_POSITIVE](0.35)
        ax.bar(range(len(values)), values, color=shades, edgecolor="0.5", linewidth=0.4)
        ax.axhline(0, color="0.3", linewidth=0.6)
        ax.set_xlim(-0.6, len(values) - 0.4)
        _number(ax.set_xticks, labels)
        ax.tick_params(labelsize="x-small")
        ax.spines[["top", "right"]].set_visible(False)
        return None

    if values.ndim == 2:
        ax.imshow(values, cmap=colours, norm=scale, aspect="auto", interpolation="nearest")
        _number(ax.set_yticks, labels)
        ax.tick_params(labelsize="x-small")
        return ScalarMappable(scale, colours)

    tiles = values if values.ndim == 4 else colours(scale(values))[..., :3]
    if picture.below is not None:
        tiles = _over(tiles, np.abs(values) / max(map(abs, picture.limits)), picture.below)
    _draw_tiles(ax, tiles, labels, columns, _ratio(picture))
    return ScalarMappable(scale, colours) if values.ndim == 3 else None


def draw_alone(picture: Picture, columns: int, ax: Axes | None, title: str) -> Figure:
    """Draw into axes, or a figure of its own, with a colour bar and a title."""
    figure, ax = axes_of(ax, WIDTH, height_of(picture, columns) + 0.6)
    drawn = draw(ax, picture, columns)
    ax.set_title(title, fontsize="medium")
    if drawn is not None:
        figure.colorbar(drawn, ax=ax, fraction=0.04, pad=0.01)
    return figure


def _over(tiles: Array, strength: Array, below: Array) -> Array:
    """Colours over an image, the stronger the more of them."""
    image = below if below.ndim == 3 else np.repeat(stretched(below)[..., None], 3, 2)
    cover = 0.75 * np.nan_to_num(np.clip(strength, 0, 1))[..., None]
    blended: Array = image[None] * (1 - cover) + tiles * cover
    return blended


def _draw_tiles(ax: Axes, tiles: Array, labels: Sequence[int], columns: int, ratio: float) -> None:
    """One image of all tiles, each 1 wide, with gaps between them.

    Args:
        tiles: (F, H, W, 3) within [0, 1].
        ratio: the height of a tile, whose width is 1.
    """
    count, height, width = tiles.shape[:3]
    if count and min(height, width):
        up, across = -(-_LEAST // height), -(-_LEAST // width)
        tiles = tiles.repeat(up, 1).repeat(across, 2)
        height, width = tiles.shape[1:3]
    rows = max(1, -(-count // columns))
    gap_x, gap_y = max(1, round(_GAP * width)), max(1, round(_GAP / ratio * height))
    shape = (rows * (height + gap_y) + gap_y, columns * (width + gap_x) + gap_x)
    whole = np.zeros((*shape, 4))
    for i, tile in enumerate(tiles):
        row, column = divmod(i, columns)
        y, x = gap_y + row * (height + gap_y), gap_x + column * (width + gap_x)
        whole[y : y + height, x : x + width, :3] = tile
        whole[y : y + height, x : x + width, 3] = 1
    # Room for a full row, whether or not it is full: tiles of all layers have one size.
    far = (shape[1] / max(width, 1), shape[0] / max(height, 1) * ratio)
    ax.imshow(whole, extent=(0, far[0], far[1], 0), interpolation="nearest")
    ax.set_aspect("equal")
    ax.set_anchor("W")
    _label_tiles(ax, labels, columns, gap_x / max(width, 1), gap_y / max(height, 1) * ratio, ratio)


def _label_tiles(
    ax: Axes, labels: Sequence[int], columns: int, gap_x: float, gap_y: float, ratio: float
) -> None:
    """The number of each tile, or of the first one in each row, where there are many."""
    ax.set_xticks([])
    ax.spines[:].set_visible(False)
    if len(labels) <= _LABELLED and columns <= 16:
        ax.set_yticks([])
        for i, label in enumerate(labels):
            row, column = divmod(i, columns)
            x, y = gap_x + column * (1 + gap_x), gap_y + row * (ratio + gap_y)
            ax.text(
                *(x + 0.04, y + 0.04, str(label)),
                fontsize="xx-small",
                va="top",
                bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.8},
            )
        return
    first = range(0, len(labels), columns)
    middle = [gap_y + i // columns * (ratio + gap_y) + ratio / 2 for i in first]
    ax.set_yticks(middle, [str(labels[i]) for i in first])
    ax.tick_params(labelsize="xx-small", length=0)


def draw_image(ax: Axes, image: Array) -> None:
    """Draw what the model was given, as `pixels` gives it."""
    ax.imshow(image, cmap="gray")
    ax.set_anchor("W")
    ax.set_title("what the model was given", loc="left", fontsize="medium", fontweight="bold")
    blank(ax)


def blank(ax: Axes) -> None:
    ax.set_xticks([])
    ax.set_yticks([])


def _ratio(picture: Picture) -> float:
    """Height of a tile whose width is 1; very long ones are squeezed to be seen."""
    height, width = picture.values.shape[1:3]
    return float(np.clip(height / max(width, 1), 0.25, 2.0))


def height_of(picture: Picture, columns: int) -> float:
    """The height of a picture that is `WIDTH` wide, in inches."""
    if picture.values.ndim == 1:
        return 0.8
    if picture.values.ndim == 2:
        return float(np.clip(0.08 * len(picture.values), 0.8, 3.0))
    rows = -(-len(picture.values) // columns)
    return max(rows, 1) * _STRIP / columns * (_ratio(picture) + _GAP)


def _number(set_ticks: Any, labels: Sequence[int]) -> None:
    """Number the filters, every n-th one where they stand close."""
    stride = max(1, -(-len(labels) // 16))
    at = range(0, len(labels), stride)
    set_ticks(list(at), [str(labels[i]) for i in at])
