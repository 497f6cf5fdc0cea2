"""What φ keeps: which inputs it still tells apart, and how it changes their distances.

If φ is continuous and injective, functions that approximate every continuous function of features
approximate, composed with φ, every continuous function of inputs (Kratsios & Bilokopytov,
"Non-Euclidean Universal Approximation", 2020): then nothing that depends on the input is out of
reach of f∘φ. A finite sample cannot show that φ is injective. It can show that φ is not: by two
inputs in one point, a *collision*. Short of that, small ratios d(φ(x), φ(y)) / d(x, y) say which
inputs f has to tell apart by ever smaller differences; and a ratio of the sample bounds the
best Lipschitz constants of φ and of its inverse from one side each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fmapkit.errors import ArgumentError, check_positive
from fmapkit.model import changed, tensors_in
from fmapkit.phi._features import axes_by_layer, gathered
from fmapkit.tables import Shown, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fmapkit.phi.function import FeatureFunction

Metric = Callable[[Tensor, Tensor], Tensor]
Pair = tuple[int, int]

_SHOWN = 16  # collisions whose pairs are kept
_ROWS = 256  # of a block of distances


@dataclass(frozen=True, slots=True)
class LayerKept:
    """What φ keeps in one layer, as far as the sample shows.

    Attributes:
        layer: its name.
        smallest: the smallest d(φ(x), φ(y)) / d(x, y) over all pairs with d(x, y) > 0.
        closest: the pair that attains it, by the numbers of the samples.
        median: of all ratios.
        largest: the largest.
        farthest: the pair that attains it.
        collisions: how many pairs with d(x, y) > 0 have features as near as `tolerance` says.
        collided: the first of these pairs.
        effective_rank: of the features: exp of the entropy of their singular values, centred (Roy
            & Vetterli 2007); between 1 and the number of features.
        features: how many there are.
        distances: (pairs,) of the features, in the order of `torch.pdist`; float64.
    """

    layer: str
    smallest: float
    closest: Pair
    median: float
    largest: float
    farthest: Pair
    collisions: int
    collided: tuple[Pair, ...]
    effective_rank: float
    features: int
    distances: Tensor = field(repr=False, compare=False)

    @property
    def distortion(self) -> float:
        """The largest ratio over the smallest; 1 where φ keeps distances up to scale."""
        return self.largest / self.smallest if self.smallest else float("inf")


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Kept(Shown):
    """What φ keeps, layer by layer.

    Attributes:
        samples: how many inputs there were.
        duplicates: pairs of inputs at distance 0, which no ratio is of.
        distances: (pairs,) of the inputs, in the order of `torch.pdist`; float64.
    """

    samples: int
    duplicates: int
    distances: Tensor
    _layers: dict[str, LayerKept]

    @property
    def layers(self) -> tuple[str, ...]:
        """Their names, in the order of φ."""
        return tuple(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[LayerKept]:
        return iter(self._layers.values())

    def __getitem__(self, layer: str) -> LayerKept:
        """What is kept in one layer.

        Raises:
            KeyError: there is no such layer.
        """
        return self._layers[layer]

    def _table(self) -> Table:
        heads = (
            *("layer", "features", "smallest", "pair", "median"),
            *("largest", "pair", "collisions", "rank"),
        )
        body = [
            (
                k.layer or "(model)",
                str(k.features),
                *(f"{k.smallest:.3g}", "{}, {}".format(*k.closest), f"{k.median:.3g}"),
                *(f"{k.largest:.3g}", "{}, {}".format(*k.farthest), str(k.collisions)),
                f"{k.effective_rank:.1f}",
            )
            for k in self
        ]
        same = f", {self.duplicates} pairs of equal inputs left out" if self.duplicates else ""
        count = self.samples * (self.samples - 1) // 2
        last = f"Kept: d(φ(x), φ(y)) / d(x, y) over {count} pairs of {self.samples} inputs{same}"
        return Table(heads, body, range(1, len(heads)), last)

    def plot(self, ax: Axes | None = None, *, title: str | None = None) -> Figure:
        """Draw the ratios by layer: smallest, median and largest (extra: `plot`).

        Raises:
            ImportError: matplotlib is not installed.
        """
        figure, ax = axes_by_layer(ax, self.layers)
        for at, layer in enumerate(self):
            low, high = layer.smallest, layer.largest
            if high > 0:
                span = [max(low, high * 1e-6), high]
                ax.plot([at, at], span, "-", color="0.6", linewidth=4, zorder=1)
                ax.plot(at, layer.median, "o", color="#b11226", zorder=2)
            if layer.collisions:
                word = "pair" if layer.collisions == 1 else "pairs"
                note = f"{layer.collisions} {word}\nin one point"
                where = ("data", "axes fraction")
                ax.annotate(note, (at, 0.02), xycoords=where, ha="center", fontsize="small")
        ax.set_yscale("log")
        ax.set_ylabel("d(φ(x), φ(y)) / d(x, y)")
        what = "what φ keeps of distances: smallest, median, largest"
        ax.set_title(title or what, loc="left", fontsize="medium")
        return figure


def kept(
    phi: FeatureFunction,
    inputs: Any,
    *,
    metric: Metric | Tensor | None = None,
    tolerance: float = 0.0,
    batch_size: int = 64,
) -> Kept:
    """Compare the distances of features with those of inputs, over all pairs of a sample.

    Distances of features are Euclidean, in float64, between rows of all values of a sample: of φ
    with `pool=` as it is with that. The model runs in eval mode, without gradients.

    Args:
        phi: of one layer or several.
        inputs: a tensor (N, …), or a tuple or dict of tensors with N samples each.
        metric: on inputs: a function of (n, …) and (m, …) that gives (n, m) distances, or all
            distances (N, N); None for the Euclidean one of all values.
        tolerance: features at this share of the layer's largest distance, or nearer, collide; at 0
            only those that are equal.
        batch_size: samples of one call.

    Raises:
        ArgumentError: an argument is outside what is allowed, or features are not finite.
    """
    if not 0 <= tolerance < 1:
        raise ArgumentError(f"tolerance must be a share of the largest distance, not {tolerance!r}")
    check_positive(batch_size=batch_size)
    count = _samples(inputs)
    given = _given(inputs, metric, count)
    apart = given > 0
    if not apart.any():
        raise ArgumentError("all inputs are at distance 0: there is no pair to compare")

    def batch(start: int) -> Any:
        some = slice(start, start + batch_size)
        return changed(inputs, lambda v: v[some] if isinstance(v, Tensor) and v.dim() else v)

    features = gathered(phi, map(batch, range(0, count, batch_size)))
    for name, x in features.items():
        if len(x) != count:
            raise ArgumentError(
                f"layer {name!r} has {len(x)} features of {count} samples", layer=name
            )
    layers = {name: _layer(name, x, given, apart, tolerance) for name, x in features.items()}
    return Kept(count, int((~apart).sum()), given, layers)


def _samples(inputs: Any) -> int:
    tensors = [t for t in tensors_in(inputs) if t.dim()]
    counts = {len(t) for t in tensors}
    if len(counts) != 1 or counts.pop() < 2:
        raise ArgumentError("inputs must be tensors with two samples or more, all with as many")
    return len(tensors[0])


def _given(inputs: Any, metric: Any, count: int) -> Tensor:
    """The distances of the inputs, pair by pair."""
    if isinstance(metric, Tensor):
        if metric.shape != (count, count):
            raise ArgumentError(
                f"metric has shape {tuple(metric.shape)}, and the {count} inputs have "
                f"{(count, count)} distances"
            )
        found = metric.detach().double().cpu()[tuple(_above(count))]
    elif not isinstance(inputs, Tensor):
        raise ArgumentError(
            "of several tensors, metric= has to say how far two inputs are apart: give all "
            "distances as a tensor (N, N)"
        )
    elif metric is None:
        found = torch.pdist(inputs.detach().double().reshape(count, -1).cpu())
    else:
        blocks = [
            torch.as_tensor(metric(inputs[at : at + _ROWS], inputs)).detach().double().cpu()
            for at in range(0, count, _ROWS)
        ]
        if any(b.dim() != 2 or b.shape[1] != count for b in blocks):
            raise ArgumentError("metric must give (n, m) distances for (n, …) and (m, …) inputs")
        found = torch.cat(blocks)[tuple(_above(count))]
    if not found.isfinite().all() or (found < 0).any():
        raise ArgumentError("distances of inputs must be finite, and none below 0")
    return found


def _above(count: int) -> Tensor:
    """Where the pairs lie in a matrix, (2, pairs), in the order of `torch.pdist`."""
    return torch.triu_indices(count, count, 1)


def _layer(name: str, x: Tensor, given: Tensor, apart: Tensor, tolerance: float) -> LayerKept:
    x = x.double()
    # By differences: |x|² + |y|² - 2xy would lose what is near.
    distances = torch.pdist(x)
    ratios = distances[apart] / given[apart]
    where = _above(len(x))[:, apart]
    low, high = int(ratios.argmin()), int(ratios.argmax())
    met = (distances <= tolerance * distances.max())[apart]
    first = met.nonzero()[:_SHOWN, 0].tolist()

    def pair(at: int) -> Pair:
        i, j = where[:, at].tolist()
        return i, j

    return LayerKept(
        layer=name,
        smallest=float(ratios[low]),
        closest=pair(low),
        median=float(np.median(ratios.numpy())),  # torch's is the lower of two in the middle
        largest=float(ratios[high]),
        farthest=pair(high),
        collisions=int(met.sum()),
        collided=tuple(map(pair, first)),
        effective_rank=_effective_rank(x),
        features=x.shape[1],
        distances=distances,
    )


def _effective_rank(x: Tensor) -> float:
    """Exp of the entropy of the singular values of centred features; 0 where all are equal."""
    values = torch.linalg.svdvals(x - x.mean(0))
    total = values.sum()
    if not total > 0:
        return 0.0
    shares = values[values > 0] / total
    return float((-(shares * shares.log()).sum()).exp())
