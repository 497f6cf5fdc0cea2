"""What `FeatureMap` and `FeatureMaps` have to be looked at: pictures, and pages to share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from fmapkit.readable import ReadableMap, ReadableMaps

if TYPE_CHECKING:
    import os
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fmapkit.page import PageMaps

__all__ = ["DrawableMap", "DrawableMaps"]


class DrawableMap:
    """Draws one map."""

    __slots__ = ()

    def plot(
        self: ReadableMap,
        ax: Axes | None = None,
        *,
        sample: int = 0,
        filters: int | Iterable[int] | Literal["strongest"] | None = None,
        max_filters: int = 16,
        columns: int | None = None,
        grid: tuple[int, int] | None = None,
        weights: bool = False,
        overlay: Any = None,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
    ) -> Figure:
        """Draw the map, a picture for each filter (extra: `plot`).

        Arguments, result and errors are those of `fmapkit.plot.plot_map`.
        """
        from fmapkit.plot import plot_map

        return plot_map(
            self,
            ax,
            sample=sample,
            filters=filters,
            max_filters=max_filters,
            columns=columns,
            grid=grid,
            weights=weights,
            overlay=overlay,
            mean=mean,
            std=std,
        )


class DrawableMaps:
    """Draws the maps of a capture, and writes them as a page."""

    def plot(
        self: ReadableMaps,
        layers: Any = None,
        *,
        sample: int = 0,
        filters: int | Iterable[int] | Literal["strongest"] | None = None,
        max_filters: int = 8,
        max_layers: int = 16,
        grid: tuple[int, int] | None = None,
        weights: bool = False,
        image: Any = None,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        title: str | None = None,
    ) -> Figure:
        """Draw z and a of each layer by filter (extra: `plot`).

        Arguments, result and errors are those of `fmapkit.plot.plot_maps`.
        """
        from fmapkit.plot import plot_maps

        return plot_maps(
            self,
            layers,
            sample=sample,
            filters=filters,
            max_filters=max_filters,
            max_layers=max_layers,
            grid=grid,
            weights=weights,
            image=image,
            mean=mean,
            std=std,
            title=title,
        )

    def plot_filters(
        self: ReadableMaps,
        layer: str,
        ax: Axes | None = None,
        *,
        filters: int | Iterable[int] | None = None,
        max_filters: int = 96,
        columns: int | None = None,
        shape: Sequence[int] | None = None,
        scale: Literal["layer", "filter"] = "layer",
    ) -> Figure:
        """Draw the weights of a layer's filters (extra: `plot`).

        Arguments, result and errors are those of `fmapkit.plot.plot_filters`.
        """
        from fmapkit.plot import plot_filters

        return plot_filters(
            self,
            layer,
            ax,
            filters=filters,
            max_filters=max_filters,
            columns=columns,
            shape=shape,
            scale=scale,
        )

    def to_html(
        self: PageMaps,
        path: str | os.PathLike[str],
        layers: Any = None,
        *,
        image: Any = None,
        sample: int = 0,
        max_filters: int = 1024,
        max_side: int = 56,
        grid: tuple[int, int] | None = None,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        analyses: Any = (),
        title: str | None = None,
    ) -> Path:
        """Write the latest pass as a page to share, one self-contained HTML file.

        Args:
            path: of the file; what is there is written over.
            layers: which layers: anything that `select(layer=...)` takes; None for all.
            image: what the model was given: (H, W), (C, H, W) or a batch (N, C, H, W), of one or
                three channels. Whole numbers are 0 to 255; others 0 to 1, or they are spread over
                that range, and the page says so.
            sample: which sample of the batch.
            max_filters: how many filters of a map go in; of more, those with the highest |value|.
            max_side: larger images go in as means of blocks of pixels, in pixels a side.
            grid: of maps of tokens that are patches of an image: their rows and columns. Tokens
                before these, such as the class token, are left out.
            mean: of the image's channels, where it was normalised by it; with `std`.
            std: of the image's channels.
            analyses: analyses and Matplotlib figures that go in below the maps.
            title: of the page.

        Returns:
            The path.

        Raises:
            NoPassError: there are no maps yet.
            MapLookupError: `layers` selects none of the captured ones.
            MapStateError: a map cannot be read any more.
            ArgumentError: there is no such sample, a number is not positive, no map has the tokens
                of `grid`, or the image has another shape.
        """
        from fmapkit import page

        return page.write_maps(
            *(self, path, layers),
            image=image,
            sample=sample,
            max_filters=max_filters,
            max_side=max_side,
            grid=grid,
            mean=mean,
            std=std,
            analyses=analyses,
            title=title,
        )
