"""Draw the parts of inputs that excite filters most, and what of them did it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch import Tensor

from fmapkit.errors import ArgumentError, check_positive
from fmapkit.plot._draw import blank
from fmapkit.plot._figure import new_figure
from fmapkit.plot._images import Array, Numbers, pixels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INCH = 1.0  # a patch


class DrawnPatch(Protocol):
    """A part of an input, to be drawn."""

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Its pixels: (top, left, bottom, right), half open."""

    @property
    def pixels(self) -> Tensor:
        """(channels, rows, columns) of the input there."""

    @property
    def image(self) -> Tensor:
        """The input."""


def plot_patches(
    patches: Mapping[int, Sequence[DrawnPatch]],
    layer: str = "",
    *,
    columns: int = 9,
    mean: Numbers = None,
    std: Numbers = None,
    below: Mapping[int, Sequence[Tensor]] | None = None,
    title: str | None = None,
    more: int = 0,
) -> Figure:
    """Draw patches, a row for each filter, the strongest on the left.

    Figure 2 of Zeiler & Fergus, "Visualizing and Understanding Convolutional Networks" (ECCV 2014),
    if `below` has the projections of the same inputs. A patch that the border of its image cuts has
    grey where it would go on.

    Args:
        patches: by filter, what `LayerTops.patches` gave.
        layer: whose filters they are, for the title.
        columns: how many patches of a filter are drawn at most.
        mean: of the images' channels, where they were normalised by it; with `std`.
        std: of the images' channels.
        below: by filter, an image (channels, rows, columns) for each of its inputs, of which the
            same patch is drawn beneath, each on a scale of its own around grey.
        title: stands above the figure.
        more: how many filters are not drawn, for the title.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
        ArgumentError: there is nothing to draw, what is below does not go with the patches, or a
            number is not positive.
    """
    check_positive(columns=columns)
    shown = {filter: list(its)[:columns] for filter, its in patches.items()}
    if not any(shown.values()):
        raise ArgumentError("nothing to plot: no filter has any patch")
    for filter, its in shown.items():
        if below is not None and len(below.get(filter, ())) < len(its):
            raise ArgumentError(
                f"below has {len(below.get(filter, ()))} images for filter {filter}, which has "
                f"{len(its)} patches"
            )
    wide = max(map(len, shown.values()))
    lines = len(shown) * (1 if below is None else 2)
    figure = new_figure(_INCH * wide + 0.9, _INCH * lines + 0.5)
    axes: Any = figure.subplots(lines, wide, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    boxes = [patch.box for its in shown.values() for patch in its]
    # The largest, which no border has cut, perhaps.
    size = max(b[2] - b[0] for b in boxes), max(b[3] - b[1] for b in boxes)
    for place, (filter, its) in enumerate(shown.items()):
        row = place if below is None else 2 * place
        for i, patch in enumerate(its):
            _show(axes[row, i], _framed(pixels(patch.pixels, mean, std), patch, size))
            if below is not None:
                _show(axes[row + 1, i], _framed(_projected(below[filter][i], patch), patch, size))
        if its:
            axes[row, 0].set_ylabel(str(filter), rotation=0, ha="right", va="center")
    note = f" ({more} more filters are not drawn)" if more else ""
    figure.suptitle(
        title or f"{layer or 'the model'}: the inputs that excite each filter most{note}"
    )
    return figure


def _framed(image: Array, patch: DrawnPatch, size: tuple[int, int]) -> Array:
    """The patch in a frame of the largest one's size, with grey beyond the border of the image."""
    height, width = image.shape[:2]
    if (height, width) == size:
        return image
    top, left, _, _ = patch.box
    rows, columns = (int(n) for n in patch.image.shape[1:])
    # What a border has cut lies at the other side of the frame.
    y = size[0] - height if top == 0 and height < rows else 0
    x = size[1] - width if left == 0 and width < columns else 0
    middle = 0.5 if image.ndim == 3 else float(np.mean(image)) if image.size else 0.0
    framed = np.full((*size, *image.shape[2:]), middle)
    framed[y : y + height, x : x + width] = image
    return framed


def _projected(image: Tensor, patch: DrawnPatch) -> Array:
    """The patch of a projection, within [0, 1] around grey."""
    if tuple(image.shape[-2:]) != tuple(patch.image.shape[-2:]):
        raise ArgumentError(
            f"below has an image of {tuple(image.shape[-2:])} pixels, and the input has "
            f"{tuple(patch.image.shape[-2:])}"
        )
    top, left, bottom, right = patch.box
    part = image.detach().float().cpu()
    part = part.unsqueeze(0) if part.ndim == 2 else part
    part = part[:, top:bottom, left:right]
    reach = float(part.abs().max()) if part.numel() else 0.0
    return pixels(part / (2 * reach or 1.0) + 0.5)


def _show(ax: Any, image: Array) -> None:
    ax.set_axis_on()
    grey = image.ndim == 2 and image.size and image.min() >= 0 and image.max() <= 1
    scale: dict[str, float] = {"vmin": 0.0, "vmax": 1.0} if grey else {}
    ax.imshow(image, cmap="gray", interpolation="nearest", **scale)
    blank(ax)
