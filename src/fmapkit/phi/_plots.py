"""Pictures of what was read out of φ, layer by layer (extra: `plot`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from fmapkit.plot import figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_kept", "plot_probe"]


class DrawnScores(Protocol):
    """The score of each layer; `Probe` is one."""

    @property
    def layers(self) -> tuple[str, ...]:
        """In the order of φ."""

    @property
    def scores(self) -> np.ndarray[Any, Any]:
        """(layers, folds)."""

    @property
    def mean(self) -> np.ndarray[Any, Any]:
        """Of the folds."""

    @property
    def chance(self) -> float | None:
        """The score of a guess."""

    @property
    def scoring(self) -> str:
        """What a score is."""


class DrawnRatios(Protocol):
    """What one layer keeps of distances; `LayerKept` is one."""

    @property
    def layer(self) -> str:
        """Its name."""

    @property
    def smallest(self) -> float:
        """The smallest ratio."""

    @property
    def median(self) -> float:
        """The ratio in the middle."""

    @property
    def largest(self) -> float:
        """The largest ratio."""

    @property
    def collisions(self) -> int:
        """Pairs in one point."""


def _figure(ax: Axes | None, count: int) -> tuple[Figure, Axes]:
    if ax is None:
        plt = figures()
        width = float(np.clip(2 + 0.7 * count, 4, 16))
        _, ax = plt.subplots(figsize=(width, 3.2), layout="constrained")
    figure: Figure = ax.figure.figure
    return figure, ax


def _by_layer(ax: Axes, layers: Any) -> None:
    ax.set_xticks(
        range(len(layers)), [layer or "(model)" for layer in layers], rotation=30, ha="right"
    )
    ax.spines[["top", "right"]].set_visible(False)


def plot_probe(found: DrawnScores, ax: Axes | None = None, *, title: str | None = None) -> Figure:
    """Draw `Probe.scores` by layer: the mean as a line, each fold as a point."""
    figure, ax = _figure(ax, len(found.layers))
    at = np.arange(len(found.layers))
    for fold in found.scores.T:
        ax.plot(at, fold, "o", color="0.6", markersize=3, zorder=1)
    ax.plot(at, found.mean, "o-", color="#b11226", zorder=2)
    if found.chance is not None:
        ax.axhline(found.chance, color="0.5", linestyle=":", linewidth=1)
        ax.text(
            len(found.layers) - 0.6,
            found.chance,
            "chance",
            ha="right",
            va="bottom",
            fontsize="small",
        )
    _by_layer(ax, found.layers)
    ax.set_ylabel(found.scoring)
    ax.set_title(
        title or f"read out by a probe, {found.scores.shape[1]} folds",
        loc="left",
        fontsize="medium",
    )
    return figure


def plot_kept(
    found: Sequence[DrawnRatios], ax: Axes | None = None, *, title: str | None = None
) -> Figure:
    """Draw the span of d(φ(x), φ(y)) / d(x, y) by layer, on a logarithmic scale."""
    figure, ax = _figure(ax, len(found))
    for at, layer in enumerate(found):
        low, high = layer.smallest, layer.largest
        middle = layer.median
        if high > 0:
            ax.plot(
                [at, at], [max(low, high * 1e-6), high], "-", color="0.6", linewidth=4, zorder=1
            )
            ax.plot(at, middle, "o", color="#b11226", zorder=2)
        if layer.collisions:
            word = "pair" if layer.collisions == 1 else "pairs"
            note = f"{layer.collisions} {word}\nin one point"
            ax.annotate(
                note, (at, 0.02), xycoords=("data", "axes fraction"), ha="center", fontsize="small"
            )
    ax.set_yscale("log")
    _by_layer(ax, [layer.layer for layer in found])
    ax.set_ylabel("d(φ(x), φ(y)) / d(x, y)")
    ax.set_title(
        title or "what φ keeps of distances: smallest, median, largest",
        loc="left",
        fontsize="medium",
    )
    return figure
