"""Draw feature maps with matplotlib (extra: `plot`); what `fm.plot()` and `maps.plot()` call.

What is drawn follows from what is left of one sample once its filters are set apart: a number for
each filter gives bars, a row for each gives a heat map, an image for each gives tiles. All filters
of a map share one colour scale: diverging and centred at 0 for everything signed, sequential from
0 for activations. Undefined values (NaN) are grey.

A figure that is returned is shown once in a notebook; in a script, `figure.savefig(...)` keeps it.
"""

from fmapkit.plot._figure import check_positive, entitle, figures
from fmapkit.plot.filters import plot_filters
from fmapkit.plot.maps import plot_map, plot_maps
from fmapkit.plot.patches import plot_patches

__all__ = ["plot_filters", "plot_map", "plot_maps", "plot_patches"]

# For the plots of other packages.
_check_positive, _entitle, _pyplot = check_positive, entitle, figures
