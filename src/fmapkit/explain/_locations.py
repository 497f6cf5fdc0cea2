"""Locations: the axes of inputs and maps that they lie along, and those of a map that are meant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fmapkit.errors import ArgumentError, FilterRangeError, is_int
from fmapkit.map import FeatureMap
from fmapkit.readable import tags

# Everywhere; one location for all samples; one for each; or where the map is largest.
At = Sequence[int] | Sequence[Sequence[int]] | int | str | None


def no_locations(fm: FeatureMap) -> ArgumentError:
    """The error where a map has to have axes of locations, and has none."""
    return ArgumentError(
        f"the {fm.kind} of layer {fm.layer!r} has shape {tuple(fm.shape)} and no locations: choose "
        "a layer before they are pooled or flattened",
        **tags(fm),
    )


def input_axes(tensor: Tensor, axes: int | Sequence[int] | None) -> tuple[int, ...]:
    """The axes of locations of an input: rows and columns, or positions."""
    shape, dims = tuple(tensor.shape), tensor.dim()
    if axes is None:
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
    if not given or not all(is_int(a) and -dims <= a < dims for a in given):
        raise ArgumentError(f"axes must be axes of the input, of shape {shape}, not {axes!r}")
    found = tuple(a % dims for a in given)
    if len(set(found)) < len(found):
        raise ArgumentError(f"axes={axes!r} names an axis of the input twice")
    return found


def checked_location(
    given: Sequence[Any], shape: tuple[int, ...], said: str, **of: Any
) -> tuple[int, ...]:
    """A location within a shape, given by integers of Python or of any library.

    An error names how it was `said`, and the map that it is `of`.
    """
    if len(given) != len(shape) or not all(
        hasattr(i, "__index__") and not isinstance(i, bool) and -n <= i < n
        for i, n in zip(given, shape, strict=True)
    ):
        raise ArgumentError(
            f"{said}: a location of the {of['kind']} of layer {of['layer']!r} is {len(shape)} "
            f"ints, within {shape}",
            **of,
        )
    return tuple(map(int, given))


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


def chosen(
    fm: FeatureMap, tensor: Tensor, axes: tuple[int, ...], filter: int | None, at: At
) -> Tensor:
    """Which elements of a map are meant: a mask of its shape.

    Args:
        tensor: the model's input.
        axes: which of its axes are locations.
        filter: the filter; None for all.
    """
    mask = torch.zeros(fm.shape, dtype=torch.bool, device=fm.device)
    within = _of_filter(fm, filter, mask)
    if at is None:
        within.fill_(True)
        return mask
    where = map_axes(fm, tensor, axes)
    if isinstance(at, str):
        if at != "strongest":
            raise ArgumentError(
                f"at must be a location, one for each sample, or 'strongest', not {at!r}"
            )
        at = _strongest(fm, where, _of_filter(fm, filter, fm.tensor.detach()))
    shape = tuple(fm.shape[a] for a in where)
    many = has_samples(fm, axes)
    samples = fm.shape[0] if many else 1
    for sample, location in enumerate(_each(fm, at, shape, samples)):
        index: list[Any] = [slice(None)] * within.dim()
        if many:
            index[0] = sample
        for axis, i in zip(where, location, strict=True):
            index[axis] = i
        within[tuple(index)] = True
    return mask


def _of_filter(fm: FeatureMap, filter: int | None, values: Tensor) -> Tensor:
    """The part of values, laid out as a map, that is of one filter; of None all."""
    if filter is None:
        return values
    if fm.filters is None:
        raise FilterRangeError(
            f"the {fm.kind} of layer {fm.layer!r} has shape {tuple(fm.shape)} and no single filter "
            "axis: leave filter= out",
            filter=filter,
            **tags(fm),
        )
    found = fm[filter].filter
    assert found is not None
    return values.narrow(fm.filter_dim or 0, fm.filters.index(found), 1)


def _strongest(fm: FeatureMap, where: tuple[int, ...], values: Tensor) -> list[tuple[int, ...]]:
    """Of each sample, the location where its values are largest."""
    others = [a for a in range(values.dim()) if a not in where and (a or fm.filter_dim == 0)]
    best = values.amax(others) if others else values
    shape = best.shape[best.dim() - len(where) :]
    flat = best.reshape(-1, max(1, shape.numel())).argmax(1)
    return [tuple(int(i) for i in torch.unravel_index(f, shape)) for f in flat]


def _each(fm: FeatureMap, at: Any, shape: tuple[int, ...], samples: int) -> list[tuple[int, ...]]:
    """One location for each sample, checked."""
    number = hasattr(at, "__index__") and not isinstance(at, Tensor)
    one = number or all(hasattr(i, "__index__") for i in at)
    given = [(at,) if number else tuple(at)] * samples if one else list(map(tuple, at))
    if len(given) != samples:
        raise ArgumentError(
            f"at has {len(given)} locations for {samples} samples: give one for each"
        )
    return [checked_location(at, shape, f"at={at!r}", **tags(fm)) for at in given]
