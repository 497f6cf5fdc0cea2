"""Draw when filters fired (extra: `plot`); what `DeadFilters.plot()` calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fmapkit.plot import entitle, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fmapkit.analysis.firings import LayerFirings

_WIDTH = 10.0  # of a figure, in inches
_FIRED, _SILENT, _DEAD, _UNSEEN = range(4)
# What a filter may have done in a span of inputs, and in which colour that is drawn.
STATES = (
    ("fired", "#fcd9a0"),
    ("silent", "#737373"),
    ("silent until now, and dead", "#b11226"),
    ("not seen", "#ffffff"),
)


def plot_firings(
    shown: list[LayerFirings], max_filters: int, title: str | None, more: int
) -> Figure:
    """Draw a strip for each layer, filters × inputs."""
    heights = [float(np.clip(0.06 * min(len(s), max_filters), 0.5, 2.0)) for s in shown]
    figure = new_figure(_WIDTH, sum(heights) + 0.5 * len(shown) + 0.9)
    rows: Any = figure.subplots(  # the last one for the legend
        len(shown) + 1, 1, height_ratios=[*heights, 0.25], squeeze=False
    )
    *strips, below = rows[:, 0]
    for ax, s in zip(strips, shown, strict=True):
        _draw(ax, s, max_filters)
    strips[-1].set_xlabel("inputs")
    _legend(below)
    entitle(figure, title, more)
    return figure


def states(s: LayerFirings) -> np.ndarray[Any, Any]:
    """(filters, spans): what each filter did in each span; the spans that have begun."""
    inputs = int(s.inputs.max())
    spans = max(1, -(-inputs // s.span))
    fired = s.history[:spans].T.cpu().numpy()
    last = s.last_input.cpu().numpy()[:, None]
    dead = s.dead.cpu().numpy()[:, None]
    begins = np.arange(spans)[None] * s.span
    picture = np.where(fired, _FIRED, _SILENT)
    picture[dead & (begins >= last) & ~fired] = _DEAD
    picture[begins >= s.inputs.cpu().numpy()[:, None]] = _UNSEEN
    return picture


def _draw(ax: Axes, s: LayerFirings, max_filters: int) -> None:
    from matplotlib.colors import ListedColormap

    order = np.argsort(s.last_input.cpu().numpy(), kind="stable")[:max_filters]
    picture = states(s)[order]
    inputs = int(s.inputs.max())
    ax.imshow(
        picture,
        cmap=ListedColormap([colour for _, colour in STATES]),
        vmin=-0.5,
        vmax=len(STATES) - 0.5,
        aspect="auto",
        interpolation="nearest",
        extent=(0, picture.shape[1] * s.span, len(order) - 0.5, -0.5),
    )
    ax.set_xlim(0, max(inputs, 1))
    names = s.filters if s.filters is not None else (0,)
    stride = max(1, -(-len(order) // (8 if len(order) > 8 else 4)))
    at = range(0, len(order), stride)
    ax.set_yticks(list(at), [str(names[order[i]]) for i in at])
    ax.tick_params(labelsize="x-small")
    count = int(s.dead.sum())
    some = f", {len(order)} drawn, the longest silent first" if len(order) < len(s) else ""
    ax.set_title(
        f"{(s.layer or '(model)') + s.path} · {s.nonlinearity or 'σ'} · {count} of {len(s)} "
        f"filters dead ({count / len(s):.0%}, by {s.rule}){some}",
        loc="left",
        fontsize="medium",
        fontweight="bold",
    )


def _legend(ax: Axes) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(facecolor=colour, label=word) for word, colour in STATES[:_UNSEEN]]
    ax.legend(handles=patches, loc="center", ncol=len(patches), frameon=False)
    ax.set_axis_off()
