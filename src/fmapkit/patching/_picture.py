"""The causal-tracing picture (extra: `plot`); what `Patching.plot()` calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from fmapkit.errors import ArgumentError
from fmapkit.plot import entitle, figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw"]


class DrawnPatching(Protocol):
    """What patching found; `Patching` says what each of these is."""

    @property
    def effect(self) -> Tensor:
        """The metric of each patched run."""

    @property
    def normalized(self) -> Tensor:
        """The metric on a scale."""

    @property
    def layers(self) -> tuple[str, ...]:
        """The rows."""

    @property
    def positions(self) -> tuple[Any, ...]:
        """The columns, where positions were patched."""

    @property
    def filters(self) -> tuple[Any, ...]:
        """The columns, where groups of filters were."""

    @property
    def kind(self) -> str:
        """Of the maps."""

    @property
    def into(self) -> str:
        """Which run was patched."""

    def mean(self, values: Tensor) -> Tensor:
        """A table of layers by the rest."""


_MANY = 40  # labels along an axis: more are drawn as numbers, thinned out by matplotlib


def draw(
    found: DrawnPatching,
    ax: Axes | None,
    positions: Sequence[str] | None,
    normalized: bool,
    title: str | None,
) -> Figure:
    """Draw layers from top to bottom by positions, or groups of filters, from left to right."""
    plt = figures()
    values = found.normalized if normalized else found.effect
    table = found.mean(values).float().numpy()
    names = found.positions or found.filters
    labels = [_label(name) for name in names]
    if positions is not None:
        if len(positions) != len(found.positions):
            raise ArgumentError(
                f"positions has {len(positions)} labels, and {len(found.positions)} positions "
                "were patched"
            )
        labels = list(positions)
    if ax is None:
        width, height = 3.5 + 0.35 * table.shape[1], 1.8 + 0.22 * table.shape[0]
        _, ax = plt.subplots(figsize=(min(width, 16), min(height, 14)), layout="constrained")
    largest = float(abs(table).max())
    signed = bool((table < -0.01 * largest).any())  # more than what rounding leaves
    drawn = ax.imshow(
        table,
        aspect="auto",
        interpolation="nearest",
        cmap="RdBu_r" if signed else "Purples",
        vmin=-largest if signed else 0.0,
        vmax=largest,
    )
    if len(found.layers) <= _MANY:
        ax.set_yticks(range(len(found.layers)), found.layers, fontsize="small")
    if labels and len(labels) <= _MANY:
        slanted = max(map(len, labels)) > 3
        ax.set_xticks(
            range(len(labels)),
            labels,
            fontsize="small",
            rotation=45 if slanted else 0,
            ha="right" if slanted else "center",
        )
    elif not labels:
        ax.set_xticks([])
    ax.set_xlabel("position" if found.positions else "filters" if found.filters else "")
    other = "clean" if found.into == "corrupted" else "corrupted"
    ax.set_title(f"{other} {found.kind} into the {found.into} run", fontsize="medium")
    figure: Figure = ax.figure.figure
    what = "0: corrupted, 1: clean" if normalized else "metric"
    figure.colorbar(drawn, ax=ax, fraction=0.05, pad=0.02, label=what)
    entitle(figure, title, 0)
    return figure


def _label(name: Any) -> str:
    if isinstance(name, tuple) and len(name) > 2 and all(isinstance(n, int) for n in name):
        return f"{name[0]}…{name[-1]}"
    return str(name)
