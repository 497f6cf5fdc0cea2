"""The usual edits for `capture(model, edit={layer: ...})`; any FeatureMap -> Tensor will do.

```python
with capture(model, edit={("conv2", "activation"): edits.only(17)}):
    model(images)  # every other activation of the layer is 0
```

`edits.only(17, at=(3, 5))` leaves one location of that filter alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

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


def only(*filters: int, at: int | Sequence[int] | None = None) -> Edit:
    """These filters as they are, and zero in all others.

    How a single activation is examined in Zeiler & Fergus, "Visualizing and Understanding
    Convolutional Networks" (2014), section 2.1: with one filter, and one location of it.

    Args:
        filters: indices along the layer's filters.
        at: one location, such as (row, column), or a position of a sequence: everything else is
            zero, in these filters, too. Negative numbers count from the end.

    Raises:
        ArgumentError: no filter is given, or `at` is no location; when the model runs: the map has
            no such location.
        FilterRangeError: when the model runs: the layer has no such filter.
    """
    if not filters:
        raise ArgumentError("only() needs at least one filter")
    location = None if at is None else _location(at)

    def edit(fm: FeatureMap) -> Tensor:
        kept = torch.zeros_like(fm.tensor)
        for index in filters:
            piece = fm[index]
            assert fm.filter_dim is not None and fm.filters is not None
            assert piece.filter is not None
            there = kept.select(fm.filter_dim, fm.filters.index(piece.filter))
            if location is None:
                there.copy_(piece.tensor)
            else:
                where = _place(fm, location)
                there[where] = piece.tensor[where]
        return kept

    return edit


def _location(at: Any) -> tuple[int, ...]:
    location = (at,) if isinstance(at, int) else tuple(at)
    if not location or not all(
        hasattr(i, "__index__") and not isinstance(i, bool) for i in location
    ):
        raise ArgumentError(f"at must be a location, such as (row, column), not {at!r}")
    return tuple(map(int, location))


def _place(fm: FeatureMap, location: tuple[int, ...]) -> tuple[Any, ...]:
    """A location as an index into one filter's map: all samples of it."""
    assert fm.filter_dim is not None
    dims = fm.tensor.dim()
    samples = 0 if fm.filter_dim % dims == 0 else 1  # filters on axis 0: there are no samples
    shape = [n for a, n in enumerate(fm.shape) if a != fm.filter_dim % dims][samples:]
    if len(location) != len(shape) or not all(
        -n <= i < n for i, n in zip(location, shape, strict=False)
    ):
        raise ArgumentError(
            f"at={location} is no location of the {fm.kind} of layer {fm.layer!r}: its locations "
            f"are {len(shape)} ints, within {tuple(shape)}"
        )
    return (*[slice(None)] * samples, *location)
