"""What `FeatureMap` and `FeatureMaps` have to be looked at: pictures, and pages to share.

Each is a function of `plot` or `page`, which is imported when it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fmapkit._lazy import LazyMethod

if TYPE_CHECKING:
    from fmapkit import page
    from fmapkit import plot as drawing


class DrawableMap:
    """Draws one map."""

    __slots__ = ()

    if TYPE_CHECKING:
        plot = drawing.plot_map
        """Draw the map, a picture for each filter (extra: `plot`): `fmapkit.plot.plot_map`."""
    else:
        plot = LazyMethod("fmapkit.plot", "plot_map")


class DrawableMaps:
    """Draws the maps of a capture, and writes them as a page."""

    if TYPE_CHECKING:
        plot = drawing.plot_maps
        """Draw z and a of each layer by filter (extra: `plot`): `fmapkit.plot.plot_maps`."""
        plot_filters = drawing.plot_filters
        """Draw the weights of a layer's filters (extra: `plot`): `fmapkit.plot.plot_filters`."""
        to_html = page.write_maps
        """Write the latest pass as a page to share, one HTML file: `fmapkit.page.write_maps`."""
    else:
        plot = LazyMethod("fmapkit.plot", "plot_maps")
        plot_filters = LazyMethod("fmapkit.plot", "plot_filters")
        to_html = LazyMethod("fmapkit.page", "write_maps")
