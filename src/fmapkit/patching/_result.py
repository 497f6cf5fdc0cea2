"""What patching found: the metric of each patched run, beside those of the two runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from fmapkit.errors import ArgumentError
from fmapkit.plot import axes_of, entitle

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OTHER = {"corrupted": "clean", "clean": "corrupted"}
_MANY = 40  # labels along an axis: more are drawn as numbers, thinned out by matplotlib


@dataclass(frozen=True, slots=True, eq=False)
class Patching:
    """The metric of each patched run.

    Attributes:
        effect: the metric, of shape (layers,), then (positions,) and (filters,) as far as these
            were asked for, then (samples,) if the metric gives one number for each.
        clean: the metric of the clean run: one number, or (samples,).
        corrupted: the metric of the corrupted run.
        layers: what was patched, in execution order: the layer, with the call where it has
            several, and the path in a nested output.
        positions: as in `patch(positions=...)`; empty where whole maps were patched.
        filters: as in `patch(filters=...)`; empty where all of them were.
        kind: of the maps.
        into: which run was patched, with maps of the other one.
    """

    effect: Tensor = field(repr=False)
    clean: Tensor
    corrupted: Tensor
    layers: tuple[str, ...]
    positions: tuple[Any, ...] = ()
    filters: tuple[Any, ...] = ()
    kind: str = "output"
    into: Literal["corrupted", "clean"] = "corrupted"

    @property
    def normalized(self) -> Tensor:
        """The effect on a scale that has 0 at the corrupted run's metric and 1 at the clean run's.

        Known as the recovered share: Wang et al., "Interpretability in the Wild" (2023). Not
        between 0 and 1 where a patch does more than the whole input; infinite, or NaN, where the
        two runs have the same metric.
        """
        return (self.effect - self.corrupted) / (self.clean - self.corrupted)

    def __repr__(self) -> str:
        grid = [f"{len(self.layers)} layers"]
        grid += [f"{len(self.positions)} positions"] if self.positions else []
        grid += [f"{len(self.filters)} groups of filters"] if self.filters else []
        clean, corrupted = float(self.clean.mean()), float(self.corrupted.mean())
        return (
            f"Patching({' × '.join(grid)}, {self.kind}, {OTHER[self.into]} into {self.into}; "
            f"metric: clean {clean:.4g}, corrupted {corrupted:.4g})"
        )

    def plot(
        self,
        ax: Axes | None = None,
        *,
        positions: Sequence[str] | None = None,
        normalized: bool = True,
        title: str | None = None,
    ) -> Figure:
        """Draw the causal-tracing picture: layer by position, or by group of filters.

        After Meng et al., "Locating and Editing Factual Associations in GPT" (2022), figure 1. Of
        a metric that gives a number for each sample, the mean is drawn.

        Args:
            ax: axes to draw into; None makes a figure.
            positions: a label for each position, such as the tokens.
            normalized: draw `normalized`; False draws `effect`.
            title: stands above.

        Returns:
            The figure.

        Raises:
            ImportError: matplotlib is not installed.
            ArgumentError: the labels do not fit, or both positions and filters were patched.
        """
        values = self.normalized if normalized else self.effect
        table = self.mean(values).float().numpy()
        names = self.positions or self.filters
        labels = [_label(name) for name in names]
        if positions is not None:
            if len(positions) != len(self.positions):
                raise ArgumentError(
                    f"positions has {len(positions)} labels, and {len(self.positions)} positions "
                    "were patched"
                )
            labels = list(positions)
        width, height = 3.5 + 0.35 * table.shape[1], 1.8 + 0.22 * table.shape[0]
        figure, ax = axes_of(ax, min(width, 16), min(height, 14))
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
        if len(self.layers) <= _MANY:
            ax.set_yticks(range(len(self.layers)), self.layers, fontsize="small")
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
        ax.set_xlabel("position" if self.positions else "filters" if self.filters else "")
        said = f"{OTHER[self.into]} {self.kind} into the {self.into} run"
        ax.set_title(said, fontsize="medium")
        what = "0: corrupted, 1: clean" if normalized else "metric"
        figure.colorbar(drawn, ax=ax, fraction=0.05, pad=0.02, label=what)
        entitle(figure, title, 0)
        return figure

    def mean(self, values: Tensor) -> Tensor:
        """A table of layers by the rest, without the axis of samples.

        Args:
            values: of the shape of `effect`.
        """
        axes = 1 + bool(self.positions) + bool(self.filters)
        table = values.mean(-1) if values.dim() > axes else values
        if axes > 2:
            raise ArgumentError(
                "a picture has two axes, and layers, positions and filters were patched: draw "
                "one of them, from dataclasses.replace(result, effect=..., filters=())"
            )
        return table.unsqueeze(1) if axes == 1 else table


def _label(name: Any) -> str:
    if isinstance(name, tuple) and len(name) > 2 and all(isinstance(n, int) for n in name):
        return f"{name[0]}…{name[-1]}"
    return str(name)
