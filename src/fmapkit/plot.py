"""Draw feature maps with matplotlib (extra: `plot`); what `fm.plot()` and `maps.plot()` call.

What is drawn follows from what is left of one sample once its filters are set apart: a number for
each filter gives bars, a row for each gives a heat map, an image for each gives tiles. All filters
of a map share one colour scale: diverging and centred at 0 for everything signed, sequential from
0 for activations. Undefined values (NaN) are grey.

matplotlib is imported when something is drawn, so that `import fmapkit` does not pay for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fmapkit.errors import ArgumentError, MapLookupError, NoPassError, listed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

    from fmapkit.maps import FeatureMap, FeatureMaps

__all__ = ["plot_map", "plot_maps"]

# Bars and heat rows are thin: so many of them are drawn where one tile would be.
_THIN = 8
_WIDTH = 10.0  # of a figure, in inches
_GAP = 0.08  # between tiles, in tile widths
_SIGNED, _POSITIVE, _UNDEFINED = "RdBu_r", "magma", "0.6"


def plot_map(
    fm: FeatureMap,
    ax: Axes | None = None,
    *,
    sample: int = 0,
    max_filters: int = 16,
    columns: int = 8,
) -> Figure:
    """Draw one map, filter by filter; the map of one filter (`fm[k]`) sample by sample.

    Args:
        fm: the map.
        ax: axes to draw into; None makes a figure.
        sample: which sample of the batch; of one filter's map the first one drawn.
        max_filters: how many filters are drawn at most, where each is an image; 8 times as many
            where each is a bar or a row. The title says how many there are.
        columns: how many images stand side by side.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
        ArgumentError: there is no such sample, or a number is not positive.
    """
    plt = _pyplot()
    _check_positive(max_filters=max_filters, columns=columns)
    picture = _picture(fm, sample, max_filters)
    if ax is None:
        width, height = _size(picture, columns)
        _, ax = plt.subplots(figsize=(width, height + 0.6), layout="constrained")
    drawn = _draw(ax, picture, columns)
    ax.set_title(f"{_heading(fm)} · {_meaning(fm)} · {picture.caption}", fontsize="medium")
    figure: Figure = ax.figure.figure  # of a subfigure: the figure it is part of
    if drawn is not None:
        figure.colorbar(drawn, ax=ax, fraction=0.04, pad=0.01)
    return figure


def plot_maps(
    maps: FeatureMaps,
    layers: Any = None,
    *,
    sample: int = 0,
    max_filters: int = 8,
    max_layers: int = 16,
    image: Any = None,
    title: str | None = None,
) -> Figure:
    """Draw the latest pass: for each layer a row of its z and a row of its a, filter by filter.

    Args:
        maps: what `capture` gave.
        layers: which layers: anything that `maps.select(layer=...)` takes; None for all.
        sample: which sample of the batch.
        max_filters: how many filters are drawn of each layer, at most (see `plot_map`).
        max_layers: how many layers are drawn at most; the figure says if there are more.
        image: what the model was given, drawn above: a tensor or array (H, W), (1, H, W) or
            (3, H, W), the last with values in [0, 1].
        title: stands above the figure.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
        NoPassError: there are no maps yet.
        MapLookupError: `layers` selects none of the captured ones.
        ArgumentError: there is no such sample, or a number is not positive.
    """
    plt = _pyplot()
    _check_positive(max_filters=max_filters, max_layers=max_layers)
    groups: dict[tuple[str, int], list[FeatureMap]] = {}
    for fm in maps.select(layer=layers, step=-1):
        groups.setdefault((fm.layer, fm.call), []).append(fm)
    if not groups:
        known = maps.layers
        if not known:
            raise NoPassError("nothing to plot: no maps are held; run the model in the block first")
        raise MapLookupError(f"nothing to plot: {layers!r} is none of {listed(known)}")
    shown = list(groups.values())[:max_layers]
    rows = [(fm, i == 0) for group in shown for i, fm in enumerate(group)]
    pictures = [_picture(fm, sample, max_filters) for fm, _ in rows]
    heights = [_size(picture, max_filters)[1] for picture in pictures]

    above = 0 if image is None else 1
    heights = [1.3] * above + heights
    total = sum(heights) + 0.3 * len(shown) + 0.6
    figure: Figure = plt.figure(figsize=(_WIDTH, total), layout="constrained")
    grid = figure.add_gridspec(len(heights), 2, width_ratios=(1, 0.012), height_ratios=heights)
    if image is not None:
        _draw_image(figure.add_subplot(grid[0, 0]), image)
    for at, ((fm, first), picture) in enumerate(zip(rows, pictures, strict=True), above):
        ax = figure.add_subplot(grid[at, 0])
        drawn = _draw(ax, picture, max_filters)
        ax.set_ylabel(_meaning(fm), rotation=0, ha="right", va="center", labelpad=12)
        if first:
            ax.set_title(
                f"{_heading(fm)} · {picture.caption}",
                loc="left",
                fontsize="medium",
                fontweight="bold",
            )
        if drawn is not None:
            figure.colorbar(drawn, cax=figure.add_subplot(grid[at, 1]))
    _entitle(figure, title, len(groups) - len(shown))
    return figure


def _entitle(figure: Figure, title: str | None, more: int) -> None:
    """Say above a figure what it shows, and how many layers it does not."""
    if more:
        note = f"{more} more layers are not drawn; choose with layers=… or raise max_layers"
        title = f"{title}\n{note}" if title else note
    if title:
        figure.suptitle(title)


@dataclass(frozen=True, slots=True)
class _Picture:
    """What is drawn of one map.

    Attributes:
        values: float, one entry along axis 0 for each filter (or sample): (F,), (F, L), (F, H, W).
        labels: the number of each of them.
        signed: whether 0 is the middle of the scale; else its lower end.
        caption: what the entries are, and of how many.
    """

    values: np.ndarray[Any, Any]
    labels: Sequence[int]
    signed: bool
    caption: str

    @property
    def limits(self) -> tuple[float, float]:
        """Ends of the colour scale, the same for all entries."""
        finite = self.values[np.isfinite(self.values)]
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
        if self.signed:
            reach = max(-low, high) or 1.0
            return -reach, reach
        low, high = min(low, 0.0), max(high, 0.0)
        # An all-zero map needs some scale; with this one its tiles have the colour of 0.
        return low, high if high > low else 1.0


def _picture(fm: FeatureMap, sample: int, max_filters: int) -> _Picture:
    tensor = fm.tensor.detach()
    one_filter = fm.filter is not None
    if one_filter:
        axis: int | None = 0 if tensor.ndim else None
    else:
        axis = None if fm.filter_dim is None else fm.filter_dim % tensor.ndim
        # Filters on axis 0 are those of an unbatched layer; else the samples lie there.
        if axis != 0 and tensor.ndim > (1 if axis is None else 0):
            _check_sample(fm, sample, tensor.shape[0])
            tensor = tensor.select(0, sample)
            axis = axis - 1 if axis is not None else None
    if axis is None:
        axis = 0
        if tensor.ndim in (0, 2):  # one number, or one image
            tensor = tensor.unsqueeze(0)
    tensor = tensor.movedim(axis, 0)
    while tensor.ndim > 3:  # a volume is shown by its middle slice
        tensor = tensor.select(1, tensor.shape[1] // 2)

    total = tensor.shape[0]
    first = 0
    if one_filter and total:
        _check_sample(fm, sample, total)
        first = sample % total
    limit = max_filters if tensor.ndim == 3 else max_filters * _THIN
    # Cut before the move to the CPU: the rest of a large map need not travel.
    tensor = tensor[first : first + limit]
    values = (tensor.abs() if tensor.is_complex() else tensor).double().cpu().numpy()

    count = values.shape[0]
    held = None if one_filter else fm.filters
    labels = list(held[:count]) if held is not None else list(range(first, first + count))
    what = "samples" if one_filter else "filters" if held is not None else "entries"
    caption = f"{total} {what}" if count == total else f"{count} of {total} {what}"
    return _Picture(values, labels, fm.kind != "activation", caption)


def _draw(ax: Axes, picture: _Picture, columns: int) -> ScalarMappable | None:
    """Draw into axes; returns what a colour bar needs, or None where the axis has the scale."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    low, high = picture.limits
    scale = Normalize(low, high)
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

    for i, (value, label) in enumerate(zip(values, labels, strict=True)):
        row, column = divmod(i, columns)
        height, width = _tile(picture)
        x, y = column * (1 + _GAP), row * (height + _GAP)
        box = (x, x + width, y + height, y)
        ax.imshow(value, cmap=colours, norm=scale, extent=box, interpolation="nearest")
        ax.text(
            *(x + 0.04, y + 0.04, str(label)),
            fontsize="xx-small",
            va="top",
            bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.8},
        )
    # Room for a full row, whether or not it is full: tiles of all layers have one size.
    rows = -(-len(values) // columns)
    ax.set_xlim(-_GAP / 2, columns * (1 + _GAP) - _GAP / 2)
    ax.set_ylim(rows * (_tile(picture)[0] + _GAP) - _GAP / 2, -_GAP / 2)
    ax.set_aspect("equal")
    ax.set_anchor("W")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    return ScalarMappable(scale, colours)


def _draw_image(ax: Axes, image: Any) -> None:
    pixels = np.asarray(image)
    if pixels.ndim == 3 and pixels.shape[0] in (1, 3):
        pixels = pixels[0] if pixels.shape[0] == 1 else pixels.transpose(1, 2, 0)
    elif pixels.ndim != 2:
        raise ArgumentError(
            f"image must have shape (H, W), (1, H, W) or (3, H, W), not {pixels.shape}"
        )
    ax.imshow(pixels, cmap="gray")
    ax.set_anchor("W")
    ax.set_title("what the model was given", loc="left", fontsize="medium", fontweight="bold")
    ax.set_xticks([])
    ax.set_yticks([])


def _tile(picture: _Picture) -> tuple[float, float]:
    """Height and width of a tile whose width is 1; very long ones are squeezed to be seen."""
    height, width = picture.values.shape[-2:]
    return float(np.clip(height / max(width, 1), 0.25, 2.0)), 1.0


def _size(picture: _Picture, columns: int) -> tuple[float, float]:
    """Width and height of a picture, in inches."""
    if picture.values.ndim == 1:
        return _WIDTH, 0.8
    if picture.values.ndim == 2:
        return _WIDTH, float(np.clip(0.08 * len(picture.values), 0.8, 3.0))
    rows = -(-len(picture.values) // columns)
    strip = _WIDTH - 2.0  # what labels and the colour bar leave
    return _WIDTH, max(rows, 1) * strip / columns * (_tile(picture)[0] + _GAP)


def _number(set_ticks: Any, labels: Sequence[int]) -> None:
    """Number the filters, every n-th one where they stand close."""
    stride = max(1, -(-len(labels) // 16))
    at = range(0, len(labels), stride)
    set_ticks(list(at), [str(labels[i]) for i in at])


def _heading(fm: FeatureMap) -> str:
    name = (fm.layer or "(model)") + fm.path
    name += f" · filter {fm.filter}" if fm.filter is not None else ""
    return name + (f" · call {fm.call}" if fm.call else "")


def _meaning(fm: FeatureMap) -> str:
    if fm.kind == "preactivation":
        return "z"
    if fm.kind == "activation":
        return f"a = {fm.nonlinearity or 'σ'}(z)"
    return fm.kind


def _check_sample(fm: FeatureMap, sample: int, count: int) -> None:
    if not -count <= sample < count:
        raise ArgumentError(
            f"sample {sample} is out of range: the {fm.kind} of layer {fm.layer!r} has shape "
            f"{tuple(fm.tensor.shape)}, so {count} samples"
        )


def _check_positive(**numbers: int) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ArgumentError(f"{name} must be a positive int, not {value!r}")


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "drawing feature maps needs matplotlib: pip install fmapkit[plot]"
        ) from error
    return pyplot
