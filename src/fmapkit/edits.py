"""The usual edits for `capture(model, edit={layer: ...})`; any FeatureMap -> Tensor will do.

```python
with capture(model, edit={("conv2", "activation"): edits.only(17)}):
    model(images)  # every other activation of the layer is 0
```
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fmapkit.errors import ArgumentError

if TYPE_CHECKING:
    from fmapkit.maps import FeatureMap

__all__ = ["clamp", "only", "replace", "scale", "zero"]

Edit = Callable[["FeatureMap"], Tensor]


def zero() -> Edit:
    """Zeros, of the map's shape: the layer, or the filters named in the key, are silenced."""
    return lambda fm: torch.zeros_like(fm.tensor)


def scale(factor: float) -> Edit:
    """The map times a number."""
    return lambda fm: fm.tensor * factor


def clamp(minimum: float | None = None, maximum: float | None = None) -> Edit:
    """The map with its values kept within bounds.

    Raises:
        ArgumentError: neither bound is given.
    """
    if minimum is None and maximum is None:
        raise ArgumentError("clamp needs a minimum, a maximum, or both")
    return lambda fm: fm.tensor.clamp(minimum, maximum)


def replace(value: Tensor | float) -> Edit:
    """Another tensor, or a number, broadcast to the map's shape."""

    def edit(fm: FeatureMap) -> Tensor:
        other = torch.as_tensor(value, dtype=fm.dtype, device=fm.device)
        return other.expand(fm.shape).clone()

    return edit


def only(*filters: int) -> Edit:
    """These filters as they are, and zero in all others.

    How a single activation is examined in Zeiler & Fergus, "Visualizing and Understanding
    Convolutional Networks" (2014), section 2.1.

    Args:
        filters: indices along the layer's filters.

    Raises:
        ArgumentError: none is given.
        FilterRangeError: when the model runs: the layer has no such filter.
    """
    if not filters:
        raise ArgumentError("only() needs at least one filter")

    def edit(fm: FeatureMap) -> Tensor:
        kept = torch.zeros_like(fm.tensor)
        for index in filters:
            piece = fm[index]
            assert fm.filter_dim is not None and fm.filters is not None
            assert piece.filter is not None
            kept.select(fm.filter_dim, fm.filters.index(piece.filter)).copy_(piece.tensor)
        return kept

    return edit
