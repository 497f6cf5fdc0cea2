"""What analyses draw: figures (extra: `plot`), and a page's section for each layer."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from fmapkit.page import Fact, Panel, Section, number_panel
from fmapkit.plot import axes_of, entitle, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fmapkit.analysis.summary import LayerFirings, LayerStatistics

_WIDTH = 10.0  # of a figure, in inches
_NUMBERED = 12  # rows up to which each cell has its figure
_FIRED, _SILENT, _DEAD, _UNSEEN = range(4)
# What a filter may have done in a span of inputs, and in which colour that is drawn.
_STATES = (
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
    from matplotlib.patches import Patch

    patches = [Patch(facecolor=colour, label=word) for word, colour in _STATES[:_UNSEEN]]
    below.legend(handles=patches, loc="center", ncol=len(patches), frameon=False)
    below.set_axis_off()
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
        cmap=ListedColormap([colour for _, colour in _STATES]),
        vmin=-0.5,
        vmax=len(_STATES) - 0.5,
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


def plot_similarity(
    values: np.ndarray[Any, Any],
    layers: tuple[list[str], list[str]],
    ax: Axes | None,
    *,
    measure: str,
    title: str | None,
) -> Figure:
    """Draw the matrix of a measure.

    Args:
        values: (rows, columns).
        layers: the names of the rows, and of the columns.
    """
    rows, columns = layers
    width, height = np.clip([2.5 + 0.45 * len(columns), 1.6 + 0.4 * len(rows)], [4, 3], 14)
    figure, ax = axes_of(ax, float(width), float(height))
    low = 0.0 if np.nanmin(values, initial=0.0) >= 0 or measure == "cka" else -1.0
    drawn = ax.imshow(values, cmap="magma", vmin=low, vmax=1, interpolation="nearest")
    ax.set_xticks(range(len(columns)), columns, rotation=40, ha="right")
    ax.set_yticks(range(len(rows)), rows)
    ax.tick_params(labelsize="small")
    if max(values.shape) <= _NUMBERED:
        for (i, j), value in np.ndenumerate(values):
            colour = "black" if value > (1 + low) / 2 else "white"
            ax.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize="small", color=colour)
    ax.set_title(title or ("linear CKA" if measure == "cka" else "RSA"), fontsize="medium")
    figure.colorbar(drawn, ax=ax, fraction=0.04, pad=0.02)
    return figure


# -- on a page -------------------------------------------------------------------------------------


def _labels(s: LayerStatistics | LayerFirings) -> tuple[int, ...]:
    return s.filters if s.filters is not None else tuple(range(len(s)))


def statistics_section(s: LayerStatistics) -> Section:
    """Mean and std of each filter, and its histogram where there is one."""
    labels = _labels(s)
    numbers = {
        "mean": s.mean,
        "std": s.std,
        "min": s.minimum,
        "max": s.maximum,
        "share of zeros": s.zero_fraction,
        "share saturated": s.saturated_fraction,
        "NaN or infinite": s.nonfinite,
    }
    facts: dict[str, Fact] = {name: (name, t.tolist()) for name, t in numbers.items()}
    note = f"{len(s)} filters" if s.filters is not None else "all values together"
    panels: list[Panel] = []
    for name in ("mean", "std"):
        values = numbers[name].double().cpu().numpy()[:, None, None]
        first = (facts[name], *(f for other, f in facts.items() if other != name))
        panels.append(
            number_panel(name, note, labels, values, "cell", signed=name == "mean", facts=first)
        )
    if s.histogram is not None and s.edges is not None:
        counts = s.histogram.double().cpu()
        shares = (counts / counts.sum(1, keepdim=True).clamp(min=1)).numpy()[:, None, :]
        panels.append(
            number_panel(
                "histogram",
                f"{note}, share of values in each of {shares.shape[2]} bins",
                labels,
                shares,
                "row",
                signed=False,
                facts=tuple(facts.values()),
                size=(1, shares.shape[2]),
                axis="bin",
                places=_bins(s.edges.tolist()),
            )
        )
    tags = [s.kind, *([f"σ = {s.nonlinearity}"] if s.nonlinearity else [])]
    return Section((s.layer or "(model)") + s.path, " · ".join(tags), tuple(panels))


def _bins(edges: list[float]) -> tuple[str, ...]:
    between = (f"{a:g} to {b:g}" for a, b in pairwise(edges))
    return (f"below {edges[0]:g}", *between, f"{edges[-1]:g} and above")


def firings_section(s: LayerFirings) -> Section:
    """When each filter fired."""
    silent: Any = (s.inputs - s.last_input).tolist()
    picture = np.asarray(states(s))
    facts: tuple[Fact, ...] = (
        ("inputs since it fired", silent),
        ("revivals", s.revivals.tolist()),
    )
    spans = picture.shape[1]
    panel = Panel(
        "fired",
        f"{int(s.dead.sum())} of {len(s)} filters dead, by {s.rule}",
        _labels(s),
        picture[:, None, :].astype(np.uint8),
        "row",
        "states",
        facts,
        words=_STATES,
        size=(1, spans),
        axis="inputs",
        places=tuple(f"{i * s.span} to {(i + 1) * s.span - 1}" for i in range(spans)),
    )
    tags = f"σ = {s.nonlinearity}" if s.nonlinearity else ""
    return Section((s.layer or "(model)") + s.path, tags, (panel,))
