"""Draw one map, or all maps of a pass."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from fmapkit.errors import ArgumentError, check_positive
from fmapkit.plot import _pictures as pictures
from fmapkit.plot._draw import WIDTH, columns_of, draw, draw_alone, draw_image, height_of
from fmapkit.plot._figure import entitle, new_figure
from fmapkit.plot._images import Array, Numbers, pixels
from fmapkit.plot._pictures import Choice, Picture
from fmapkit.readable import ReadableMap, ReadableMaps, tags

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_map(
    fm: ReadableMap,
    ax: Axes | None = None,
    *,
    sample: int = 0,
    filters: Choice = None,
    max_filters: int = 16,
    columns: int | None = None,
    grid: tuple[int, int] | None = None,
    weights: bool = False,
    overlay: Any = None,
    mean: Numbers = None,
    std: Numbers = None,
) -> Figure:
    """Draw one map, filter by filter; the map of one filter (`fm[k]`) sample by sample.

    Args:
        fm: the map.
        ax: axes to draw into; None makes a figure.
        sample: which sample of the batch; of one filter's map the first one drawn.
        filters: which ones, in that order; "strongest": those with the strongest values in the
            sample, the strongest first; None for the first ones.
        max_filters: how many filters are drawn at most, where each is an image; 8 times as many
            where each is a bar or a row. The title says how many there are.
        columns: how many images stand side by side; None for as many as suit their number.
        grid: of a map of tokens that are patches of an image: their rows and columns. Tokens before
            the last of those (class token, registers) are left out.
        weights: draw the weights of each filter above its map.
        overlay: what the model was given: each map is laid over it. As `image` of `plot_maps`.
        mean: of the channels of `overlay`, where it was normalised by it; with `std`.
        std: of its channels.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
        ArgumentError: there is no such sample, a number is not positive, or an argument does not go
            with the map.
        FilterRangeError: there is no such filter.
        KindNotCapturedError: its weights were computed in the pass, and not held.
    """
    check_positive(max_filters=max_filters, **({} if columns is None else {"columns": columns}))
    below = None if overlay is None else pixels(overlay, mean, std, "overlay", sample)
    picture = pictures.of_map(fm, sample, max_filters, filters, grid, below)
    columns = columns_of(len(picture.labels), columns)
    title = f"{_heading(fm)} · {pictures.meaning(fm)} · {picture.caption}"
    if weights:
        if ax is not None:
            raise ArgumentError("weights=True draws two axes: leave ax out")
        rows = [_Row(_weights(fm, picture), "w", title), _Row(picture, pictures.meaning(fm))]
        return _drawn(rows, columns, None)
    return draw_alone(picture, columns, ax, title)


def plot_maps(
    maps: ReadableMaps,
    layers: Any = None,
    *,
    sample: int = 0,
    filters: Choice = None,
    max_filters: int = 8,
    max_layers: int = 16,
    grid: tuple[int, int] | None = None,
    weights: bool = False,
    image: Any = None,
    mean: Numbers = None,
    std: Numbers = None,
    title: str | None = None,
) -> Figure:
    """Draw the latest pass: for each layer a row of its z and a row of its a, filter by filter.

    Args:
        maps: what `capture` gave.
        layers: which layers: anything that `maps.select(layer=...)` takes; None for all.
        sample: which sample of the batch.
        filters: which filters of each layer, in that order; "strongest": those with the strongest
            activations in the sample; None for the first ones.
        max_filters: how many filters are drawn of each layer, at most (see `plot_map`).
        max_layers: how many layers are drawn at most; the figure says if there are more.
        grid: of maps of tokens that are patches of an image: their rows and columns.
        weights: draw the weights of each layer's filters above their maps.
        image: what the model was given, drawn above: a tensor or array (H, W), (1, H, W) or
            (3, H, W), or the batch of these, with values in [0, 1], or whole numbers to 255.
        mean: of the image's channels, where it was normalised by it; with `std`.
        std: of the image's channels.
        title: stands above the figure.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
        NoPassError: there are no maps yet.
        MapLookupError: `layers` selects none of the captured ones.
        ArgumentError: there is no such sample, or a number is not positive.
        FilterRangeError: a layer has no such filter.
        KindNotCapturedError: a layer's weights were computed in the pass, and not held.
    """
    check_positive(max_filters=max_filters, max_layers=max_layers)
    groups = pictures.by_call(pictures.latest_maps(maps, layers, "plot"))
    shown = groups[:max_layers]
    rows: list[_Row] = []
    for group in shown:
        rows += _of_layer(group, sample, filters, max_filters, grid, weights)
    above = None if image is None else pixels(image, mean, std, sample=sample)
    figure = _drawn(rows, min(max_filters, 16), above, len(shown))
    entitle(figure, title, len(groups) - len(shown))
    return figure


class _Row(NamedTuple):
    """One row of a figure: what is drawn, what it is, and what stands above it."""

    picture: Picture
    says: str
    title: str = ""


def _of_layer(
    group: list[ReadableMap],
    sample: int,
    filters: Choice,
    max_filters: int,
    grid: tuple[int, int] | None,
    weights: bool,
) -> list[_Row]:
    """The rows of one layer: the same filters in each."""
    wanted = filters
    own = [fm for fm in group if fm.filters is not None and fm.kind != "input"]
    if isinstance(filters, str) and own:
        leads = pictures.leading(own)
        thin = max_filters * (1 if leads.tensor.ndim > 3 or grid else pictures.THIN)
        wanted = pictures.chosen(leads, filters, sample, thin)
    rows: list[_Row] = []
    title = ""
    for fm in group:
        its = wanted if any(fm is one for one in own) else None  # an input's are other filters
        picture = pictures.of_map(
            fm, sample, max_filters, its, None if fm.filters is None else grid
        )
        if isinstance(filters, str) and its is not None:
            picture = replace(picture, caption=f"{picture.caption}, the strongest")
        title = title or f"{_heading(fm)} · {picture.caption}"
        if weights and fm in own and fm.kind != "output":
            weights = False  # once
            if fm.weight is not None:
                rows.append(_Row(_weights(fm, picture), "w"))
        rows.append(_Row(picture, pictures.meaning(fm)))
    return [rows[0]._replace(title=title), *rows[1:]]


def _weights(fm: ReadableMap, picture: Picture) -> Picture:
    """The weights of the filters that a picture shows."""
    weight = fm.weight
    if weight is None:
        raise ArgumentError(
            f"weights=True: no layer with weights made the {fm.kind} of layer {fm.layer!r}",
            **tags(fm),
        )
    if fm.filter is not None:
        return pictures.of_weights(weight.unsqueeze(0), [fm.filter], 1)
    if fm.filters is None:
        raise ArgumentError(
            f"weights=True: the filters of the {fm.kind} of layer {fm.layer!r} lie along several "
            "axes; fm.weight has their weights",
            **tags(fm),
        )
    places = [fm.filters.index(label) for label in picture.labels]
    return pictures.of_weights(weight[places], picture.labels, len(fm.filters))


def _drawn(rows: list[_Row], columns: int, image: Array | None, layers: int = 1) -> Figure:
    """A figure of rows, with their colour bars, below an image."""
    above = 0 if image is None else 1
    heights = [1.3] * above + [height_of(row.picture, columns) for row in rows]
    total = sum(heights) + 0.3 * layers + 0.6
    figure = new_figure(WIDTH, total)
    grid = figure.add_gridspec(len(heights), 2, width_ratios=(1, 0.012), height_ratios=heights)
    if image is not None:
        draw_image(figure.add_subplot(grid[0, 0]), image)
    for at, row in enumerate(rows, above):
        ax = figure.add_subplot(grid[at, 0])
        drawn = draw(ax, row.picture, columns)
        ax.set_ylabel(row.says, rotation=0, ha="right", va="center", labelpad=12)
        if row.title:
            ax.set_title(row.title, loc="left", fontsize="medium", fontweight="bold")
        if drawn is not None:
            figure.colorbar(drawn, cax=figure.add_subplot(grid[at, 1]))
    return figure


def _heading(fm: ReadableMap) -> str:
    name = (fm.layer or "(model)") + fm.path
    name += f" · filter {fm.filter}" if fm.filter is not None else ""
    return name + (f" · call {fm.call}" if fm.call else "")
