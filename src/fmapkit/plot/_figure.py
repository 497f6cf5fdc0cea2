"""Figures to draw into, and what every plot checks.

matplotlib is imported when something is drawn, so that `import fmapkit` does not pay for it.
"""

from __future__ import annotations

import io
from functools import cache
from typing import TYPE_CHECKING, Any

from fmapkit._lazy import needed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """A figure of some size in inches.

    A figure of pyplot's that a cell returns is shown twice in a notebook: as the cell's result, and
    again by pyplot, which shows whatever is open. So pyplot is left out: the figure shows itself.
    Where windows can be opened, it makes the figure, and `pyplot.show()` shows it.
    """
    says = "drawing feature maps needs matplotlib: pip install fmapkit[plot]"
    backend = needed("matplotlib", says).get_backend().lower()
    make = _figure_type()
    silent = backend in ("agg", "cairo", "pdf", "pgf", "ps", "svg", "template")
    if not silent and "inline" not in backend:
        from matplotlib import pyplot

        make = pyplot.figure
    made: Figure = make(figsize=(width, height), layout="constrained")
    return made


def axes_of(ax: Axes | None, width: float, height: float) -> tuple[Figure, Axes]:
    """The figure of some axes, and these; of None new ones, of that size in inches."""
    ax = new_figure(width, height).subplots() if ax is None else ax
    return ax.figure.figure, ax  # of a subfigure: the figure that it is part of


@cache
def _figure_type() -> Any:
    from matplotlib.figure import Figure

    class ShownFigure(Figure):
        """A figure that a notebook shows, whether or not pyplot was ever imported there."""

        __qualname__ = "ShownFigure"  # where pickle finds it

        def _repr_png_(self) -> bytes:
            file = io.BytesIO()
            self.savefig(file, format="png", bbox_inches="tight")
            return file.getvalue()

    return ShownFigure


def __getattr__(name: str) -> Any:
    if name != "ShownFigure":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _figure_type()


def entitle(figure: Figure, title: str | None, more: int) -> None:
    """Say above a figure what it shows, and how many layers it does not."""
    if more:
        note = f"{more} more layers are not drawn; choose with layers=… or raise max_layers"
        title = f"{title}\n{note}" if title else note
    if title:
        figure.suptitle(title)
