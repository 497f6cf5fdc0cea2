"""Draw feature maps with matplotlib (extra: `plot`); what `fm.plot()` and `maps.plot()` call.

What is drawn follows from what is left of one sample once its filters are set apart: a number for
each filter gives bars, a row for each gives a heat map, an image for each gives tiles. All filters
of a map share one colour scale: diverging and centred at 0 for everything signed, sequential from
0 for activations. Undefined values (NaN) are grey.

    fm.plot(), maps.plot()   maps.plot_map, plot_maps
    maps.plot_filters()      filters.plot_filters
    top.plot()               patches.plot_patches
      -> _pictures           a map or weights of one sample -> a `Picture`, arrays alone
      -> _images             an image that the model was given -> the same
      -> _draw               a `Picture` into axes
      -> _figure             the figure, of pyplot's or one that shows itself

A figure that is returned is shown once in a notebook; in a script, `figure.savefig(...)` keeps it.
"""

from fmapkit.plot._figure import axes_of as axes_of
from fmapkit.plot._figure import entitle as entitle
from fmapkit.plot._figure import new_figure as new_figure
from fmapkit.plot._images import pixels as pixels
from fmapkit.plot._images import spread_pixels as spread_pixels
from fmapkit.plot._pictures import by_call as by_call
from fmapkit.plot._pictures import by_filter as by_filter
from fmapkit.plot._pictures import check_strongest as check_strongest
from fmapkit.plot._pictures import is_signed as is_signed
from fmapkit.plot._pictures import latest_maps as latest_maps
from fmapkit.plot._pictures import leading as leading
from fmapkit.plot._pictures import meaning as meaning
from fmapkit.plot.filters import plot_filters
from fmapkit.plot.maps import plot_map, plot_maps
from fmapkit.plot.patches import plot_patches

# The others are for pictures and pages of other packages.
__all__ = ["plot_filters", "plot_map", "plot_maps", "plot_patches"]
