"""Some elements of a map: of one filter or all, at one location or all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fmapkit.errors import ArgumentError
from fmapkit.explain._axes import has_samples, is_location, map_axes
from fmapkit.explain._passes import check_filter
from fmapkit.map import FeatureMap
from fmapkit.readable import tags

# Everywhere; one location for all samples; one for each; or where the map is largest.
At = Sequence[int] | Sequence[Sequence[int]] | int | str | None


def chosen(
    fm: FeatureMap, tensor: Tensor, axes: tuple[int, ...], filter: int | None, at: At
) -> Tensor:
    """Which elements of a map are meant: a mask of its shape.

    Args:
        tensor: the model's input.
        axes: which of its axes are locations.
        filter: the filter; None for all.

    Raises:
        FilterRangeError: there is no such filter.
        ArgumentError: there is no such location.
    """
    place = check_filter(fm, filter)
    mask = torch.zeros(fm.shape, dtype=torch.bool, device=fm.device)
    within = mask if place is None else mask.select(fm.filter_dim or 0, place)
    if at is None:
        within.fill_(True)
        return mask
    where = map_axes(fm, tensor, axes)
    if isinstance(at, str):
        if at != "strongest":
            raise ArgumentError(
                f"at must be a location, one for each sample, or 'strongest', not {at!r}"
            )
        at = strongest(fm, where, place)
    shape = tuple(fm.shape[a] for a in where)
    many = has_samples(fm, axes)
    samples = fm.shape[0] if many else 1
    for sample, location in enumerate(_each(fm, at, shape, samples)):
        index: list[Any] = [slice(None)] * mask.dim()
        if many:
            index[0] = sample
        for axis, i in zip(where, location, strict=True):
            index[axis] = i
        if place is not None:
            index[fm.filter_dim or 0] = place
        mask[tuple(index)] = True
    return mask


def strongest(fm: FeatureMap, where: tuple[int, ...], place: int | None) -> list[tuple[int, ...]]:
    """Of each sample, the location where the filter (or any of them) is largest."""
    values = fm.tensor.detach()
    dims = values.dim()
    if place is not None:
        values = values.index_select(
            fm.filter_dim or 0, torch.tensor([place], device=values.device)
        )
    others = [a for a in range(dims) if a not in where and (a or fm.filter_dim == 0)]
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
    for location in given:
        if not is_location(location, shape):
            raise ArgumentError(
                f"at={location!r}: a location of the {fm.kind} of layer {fm.layer!r} is "
                f"{len(shape)} ints, within {shape}",
                **tags(fm),
            )
    return [tuple(map(int, location)) for location in given]
