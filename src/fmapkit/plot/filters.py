"""Draw the filters of a layer: its weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from fmapkit.errors import ArgumentError, check_choice, check_positive, no_layer
from fmapkit.plot import _pictures as pictures
from fmapkit.plot._draw import columns_of, draw_alone
from fmapkit.readable import ReadableMap, ReadableMaps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_filters(
    maps: ReadableMaps,
    layer: str,
    ax: Axes | None = None,
    *,
    filters: int | Iterable[int] | None = None,
    max_filters: int = 96,
    columns: int | None = None,
    shape: Sequence[int] | None = None,
    scale: Literal["layer", "filter"] = "layer",
) -> Figure:
    """Draw the weights of a layer's filters, one picture for each.

    Of the first layer, what each filter looks for, as in Krizhevsky, Sutskever & Hinton, "ImageNet
    Classification with Deep Convolutional Neural Networks" (NIPS 2012), figure 3: kernels on three
    channels are drawn in colours around grey. Kernels on one channel are drawn by value, and of
    more channels the root of the sum of squares over them.

    Args:
        maps: what `capture` gave; of its latest pass, any map that the filters made.
        layer: the layer's name.
        ax: axes to draw into; None makes a figure.
        filters: which ones, in that order; None for the first ones.
        max_filters: how many are drawn at most. The title says how many there are.
        columns: how many stand side by side; None for as many as suit their number.
        shape: of what a linear layer is given, if that is an image: (channels, rows, columns) or
            (rows, columns).
        scale: "layer": one for all filters; "filter": each has its own.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
        UnknownLayerError: no map of such a layer is held.
        ArgumentError: no weights made its maps, `shape` does not fit them, or a number is not
            positive.
        FilterRangeError: there is no such filter.
        KindNotCapturedError: the weights were computed in the pass, and not held.
    """
    check_positive(max_filters=max_filters, **({} if columns is None else {"columns": columns}))
    check_choice(("layer", "filter"), scale=scale)
    fm = _whose(maps, layer)
    assert fm.filters is not None
    chosen = pictures.chosen(fm, filters, 0, max_filters) or list(fm.filters[:max_filters])
    weight = fm.weight
    assert weight is not None
    rows = weight[[fm.filters.index(f) for f in chosen]]
    picture = pictures.of_weights(rows, chosen, len(fm.filters), shape, scale)
    title = f"{fm.layer or '(model)'} · {picture.caption}"
    return draw_alone(picture, columns_of(len(chosen), columns), ax, title)


def _whose(maps: ReadableMaps, layer: str) -> ReadableMap:
    """A map of the layer, with as many of its filters as there are."""
    if not isinstance(layer, str):
        raise ArgumentError(f"plot_filters takes the name of one layer, not {layer!r}", layer=None)
    found = [fm for fm in maps.select(layer, step=-1) if fm.kind not in ("input", "output")]
    if not found:
        raise no_layer(layer, maps.layers)
    made = [fm for fm in found if fm.filters is not None and fm.weight is not None]
    if not made:
        raise ArgumentError(f"no layer with weights made the maps of {layer!r}", layer=layer)
    return max(made, key=len)
