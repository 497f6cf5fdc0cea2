"""Features of many inputs, as matrices with a row for each sample: what all readings of φ share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fmapkit._lazy import needed
from fmapkit.errors import ArgumentError
from fmapkit.model import run
from fmapkit.plot import axes_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def named(layers: Iterable[Any], features: Any) -> dict[Any, Tensor]:
    """What φ returned, by the name of each layer."""
    if isinstance(features, Mapping):
        return dict(features)
    several = features if isinstance(features, (tuple, list)) else (features,)
    return dict(zip(layers, several, strict=False))


def gathered(phi: Any, batches: Iterable[Any]) -> dict[str, Tensor]:
    """The features of all samples of some batches, by layer, as `rows` has them, on the CPU.

    The model runs in eval mode, without gradients.
    """
    parts: dict[str, list[Tensor]] = {}
    with evaluating(phi), torch.no_grad():
        for inputs in batches:
            for layer, x in named(phi.layers, run(phi, inputs)).items():
                parts.setdefault(layer, []).append(rows(x).cpu())
    found = {layer: torch.cat(of) for layer, of in parts.items()}
    for layer, x in found.items():
        if not x.isfinite().all():
            raise ArgumentError(f"features of layer {layer!r} are not all finite", layer=layer)
    return found


def one(features: Any, what: str) -> Tensor:
    """What φ returned, if it is of one layer."""
    if not isinstance(features, Tensor):
        raise ArgumentError(f"{what} is of one layer, and this feature_map returns several")
    return features


def rows(features: Tensor) -> Tensor:
    """(samples, features): in float32 at least, since sums of halves lose most of their digits."""
    if features.is_complex():
        raise ArgumentError("features are complex: pool=torch.view_as_real makes them real")
    if not features.dim():
        raise ArgumentError("features have no axis of samples: each call gave one number")
    if not features.is_floating_point() or features.element_size() < 4:
        features = features.float()
    return features.flatten(1) if features.dim() > 1 else features[:, None]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode for a while; each of its modules gets its own mode back."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def sklearn_needed() -> None:
    """Raise an `ImportError` unless scikit-learn is there."""
    needed("sklearn", "probes and transformers need scikit-learn: pip install fmapkit[sklearn]")


def axes_by_layer(ax: Axes | None, layers: Sequence[str]) -> tuple[Figure, Axes]:
    """The figure of some axes, or a new one; the names of the layers stand below the axis."""
    figure, ax = axes_of(ax, min(max(2 + 0.7 * len(layers), 4.0), 16.0), 3.2)
    names = [layer or "(model)" for layer in layers]
    ax.set_xticks(range(len(layers)), names, rotation=30, ha="right")
    ax.spines[["top", "right"]].set_visible(False)
    return figure, ax
