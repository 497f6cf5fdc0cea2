"""Which axes of an input, and of a map, are locations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fmapkit.errors import ArgumentError
from fmapkit.map import FeatureMap
from fmapkit.readable import tags


def no_locations(fm: FeatureMap) -> ArgumentError:
    """The error where a map has to have axes of locations, and has none."""
    return ArgumentError(
        f"the {fm.kind} of layer {fm.layer!r} has shape {tuple(fm.shape)} and no locations: choose "
        "a layer before they are pooled or flattened",
        **tags(fm),
    )


def input_axes(tensor: Tensor, axes: int | Sequence[int] | None) -> tuple[int, ...]:
    """The axes of locations of an input: rows and columns, or positions.

    Raises:
        ArgumentError: they cannot be meant, or have to be said.
    """
    shape = tuple(tensor.shape)
    if axes is None:
        dims = len(shape)
        if dims in (1, 2):
            return (dims - 1,)  # tokens, or features, one after the other
        if dims not in (4, 5):
            raise ArgumentError(
                f"an input of shape {shape} may be (samples, channels, positions), (samples, "
                "positions, features) or one image: say which of its axes are locations, with "
                "axes=2, axes=1 or axes=(1, 2)"
            )
        return tuple(range(2, dims))
    given = (axes,) if isinstance(axes, int) else tuple(axes)
    ints = all(isinstance(a, int) and not isinstance(a, bool) for a in given)
    if not given or not ints or not all(-len(shape) <= a < len(shape) for a in given):
        raise ArgumentError(f"axes must be axes of the input, of shape {shape}, not {axes!r}")
    found = tuple(a % len(shape) for a in given)
    if len(set(found)) < len(found):
        raise ArgumentError(f"axes={axes!r} names an axis of the input twice")
    return found


def is_location(given: Sequence[Any], shape: Sequence[int]) -> bool:
    """Whether some integers, of Python or of any library, are a location within a shape."""
    return len(given) == len(shape) and all(
        hasattr(i, "__index__") and not isinstance(i, bool) and -n <= i < n
        for i, n in zip(given, shape, strict=True)
    )


def has_samples(fm: FeatureMap, axes: tuple[int, ...]) -> bool:
    """Whether axis 0 of a map, and of the input, is that of the samples."""
    return 0 not in axes and (fm.filter_dim is None or fm.filter_dim % fm.tensor.dim() != 0)


def map_axes(fm: FeatureMap, tensor: Tensor, axes: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of locations of a map: neither the samples nor the filters."""
    dims = fm.tensor.dim()
    if fm.filter_dim is None and fm.filters is None and dims == tensor.dim() and fm.filter is None:
        return axes  # laid out as the input
    filters = None if fm.filter_dim is None else fm.filter_dim % dims
    samples = 0 if dims and has_samples(fm, axes) else None
    return tuple(a for a in range(dims) if a not in (filters, samples))
