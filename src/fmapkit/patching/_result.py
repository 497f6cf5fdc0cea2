"""What patching found: the metric of each patched run, beside those of the two runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from fmapkit.errors import ArgumentError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Patching"]


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
        other = "clean" if self.into == "corrupted" else "corrupted"
        clean, corrupted = float(self.clean.mean()), float(self.corrupted.mean())
        return (
            f"Patching({' × '.join(grid)}, {self.kind}, {other} into {self.into}; "
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
        from fmapkit.patching._picture import draw

        return draw(self, ax, positions, normalized, title)

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
