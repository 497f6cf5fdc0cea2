"""The part of a map that an edit is for: some filters, at some positions; taken out, and put back.

Positions lie along the axes that count neither samples nor filters. What is taken out is laid out
as the map is, without the axes of which one position was picked; several points, or those that are
each sample's own, lie along one axis in the place of the first of the axes they were picked from.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmapkit.editing.where import Where
from fmapkit.errors import EditError
from fmapkit.map import FeatureMap
from fmapkit.readable import tags

Put = Callable[[Tensor], Tensor]


def part_of(fm: FeatureMap, where: Where) -> tuple[FeatureMap, Put]:
    """The part of a map that is meant, and what puts something in its place.

    Returns:
        The part, and a function of a tensor of its shape that returns a new whole: a copy of the
        map with that tensor in place of the part.

    Raises:
        EditError: the map has no such axes or positions.
        FilterRangeError: it has no such filter.
    """
    if where.filter_axis is not None:
        fm = _with_filters(fm, where.filter_axis)
    steps: list[Put] = []
    if where.at is not None:
        fm, put = _at_positions(fm, where)
        steps.append(put)
    if where.filter is not None:
        fm, put = _of_filters(fm, where.filter)
        steps.append(put)

    def put_back(tensor: Tensor) -> Tensor:
        for step in reversed(steps):
            tensor = step(tensor)
        return tensor

    return fm, put_back


def _with_filters(fm: FeatureMap, axis: int) -> FeatureMap:
    rank = fm.tensor.dim()
    if not -rank <= axis < rank:
        raise EditError(
            f"{_name(fm)} has {rank} axes, so filter_axis={axis} is none of them", **tags(fm)
        )
    axis %= rank
    if fm.filter_dim == axis:
        return fm
    return replace(fm, filter_dim=axis, filters=range(fm.tensor.shape[axis]))


def _name(fm: FeatureMap) -> str:
    path = f" at {fm.path}" if fm.path else ""
    return f"the {fm.kind}{path} of layer {fm.layer!r}, of shape {tuple(fm.shape)},"


# -- filters ----------------------------------------------------------------------------------


def _of_filters(fm: FeatureMap, wanted: Any) -> tuple[FeatureMap, Put]:
    """One filter's map without the axis of filters, or that of several with it."""
    whole, dim = fm.tensor, fm.filter_dim
    if dim is None:
        raise EditError(
            f"{_name(fm)} has no axis of filters that the data tells of: say it with "
            "edits.Where(..., filter_axis=-1)",
            **tags(fm),
        )
    index: tuple[Any, ...]
    if isinstance(wanted, int):
        piece = fm[wanted]
        assert fm.filters is not None and piece.filter is not None
        index = (*[slice(None)] * dim, fm.filters.index(piece.filter))
    else:
        numbers = tuple(number for k in wanted if (number := fm[k].filter) is not None)
        assert fm.filters is not None
        index = (*[slice(None)] * dim, _as_slice([fm.filters.index(number) for number in numbers]))
        piece = replace(fm, tensor=whole[index], filters=numbers)

    def put(tensor: Tensor) -> Tensor:
        made = whole.clone()
        made[index] = tensor
        return made

    return piece, put


def _as_slice(places: list[int]) -> Any:
    """The same places as a slice, where they are one: it needs no index on the device."""
    if len(places) == 1 or all(b - a == 1 for a, b in itertools.pairwise(places)):
        return slice(places[0], places[-1] + 1)
    return places


# -- positions --------------------------------------------------------------------------------


def _at_positions(fm: FeatureMap, where: Where) -> tuple[FeatureMap, Put]:
    whole, filters = fm.tensor, fm.filter_dim
    rank = whole.dim()
    if filters is None:
        raise EditError(
            f"{_name(fm)} has no axis of filters that the data tells of, so its positions cannot "
            "be told from them: say it with edits.Where(..., filter_axis=-1)",
            **tags(fm),
        )
    batch = where.batch_axis
    if batch is not None:
        if not -rank <= batch < rank:
            raise EditError(f"{_name(fm)} has no axis {batch}, as batch_axis= says", **tags(fm))
        batch %= rank
    if batch == filters:
        if where.batch_axis != 0:
            raise EditError(
                f"batch_axis={where.batch_axis} is the axis of filters of {_name(fm)}", **tags(fm)
            )
        batch = None  # a map without samples, which begins with its filters
    axes = [d for d in range(rank) if d not in (batch, filters)]
    if not axes:
        raise EditError(
            f"{_name(fm)} has no axis of positions: axis {batch} counts samples, and axis "
            f"{filters} filters",
            **tags(fm),
        )
    order = [*([] if batch is None else [batch]), *axes, filters]
    moved = whole.permute(order)
    at = where.at(fm) if callable(where.at) else where.at
    index, kept, point = _index(at, moved, batch, axes, fm)
    try:
        piece = moved[index]
    except IndexError as error:
        what = _name(fm).removesuffix(",")
        raise EditError(f"at={where.at!r} is outside of {what}: {error}", **tags(fm)) from None
    except ValueError as error:  # of a slice that goes backwards
        raise EditError(f"at={where.at!r} is no part of a tensor: {error}", **tags(fm)) from None
    if point:
        piece = piece.squeeze(1)
    place = sum(d < filters for d in kept)
    piece = piece.movedim(-1, place)
    picked = replace(fm, tensor=piece, filter_dim=place)

    def put(tensor: Tensor) -> Tensor:
        made = whole.clone()
        back = tensor.movedim(place, -1)
        made.permute(order)[index] = back.unsqueeze(1) if point else back
        return made

    return picked, put


def _index(
    at: Any, moved: Tensor, batch: int | None, axes: list[int], fm: FeatureMap
) -> tuple[tuple[Any, ...], list[int], bool]:
    """What picks the positions from samples × positions × filters.

    Returns:
        The index; the axes of the map, but for that of filters, that what it picks still has; and
        whether it picks one position of each sample, along an axis of length 1.
    """
    samples = moved.shape[0] if batch is not None else None
    extents = tuple(moved.shape[:-1] if batch is None else moved.shape[1:-1])
    every: tuple[Any, ...] = () if batch is None else (slice(None),)
    kept = [] if batch is None else [batch]
    given = [_plain(part, moved) for part in (at if isinstance(at, tuple) else (at,))]
    if len(given) == 1 and isinstance(given[0], Tensor) and given[0].dtype is torch.bool:
        mask = given[0]
        if tuple(mask.shape) == extents:
            return (*every, mask), [*kept, axes[0]], False
        if samples is not None and tuple(mask.shape) == (samples, *extents):
            return (mask,), kept, False  # the points of all samples, one after the other
        raise EditError(
            f"at= is a mask of shape {tuple(mask.shape)}, and {_name(fm)} has positions "
            f"{extents}" + (f" of {samples} samples" if samples is not None else ""),
            **tags(fm),
        )
    if len(given) != len(axes):
        raise EditError(
            f"at= says a place along {len(given)} axes, and {_name(fm)} has positions along "
            f"{len(axes)}" + ("; several positions are a list, [0, 5]" if len(axes) == 1 else ""),
            **tags(fm),
        )
    if any(isinstance(part, Tensor) for part in given):
        index, point = _of_each_sample(given, moved, samples, fm)
        return index, kept if point else [*kept, axes[0]], point
    kept += [axis for axis, part in zip(axes, given, strict=True) if isinstance(part, slice)]
    if any(isinstance(part, list) for part in given):
        places = [i for i, part in enumerate(given) if not isinstance(part, slice)]
        if places[-1] - places[0] + 1 != len(places):
            raise EditError(
                "at= has a slice between two lists, which has no clear meaning", **tags(fm)
            )
        device = moved.device
        given = [p if isinstance(p, slice) else torch.as_tensor(p, device=device) for p in given]
        kept.append(axes[places[0]])
    return (*every, *given), kept, False


def _of_each_sample(
    given: list[Any], moved: Tensor, samples: int | None, fm: FeatureMap
) -> tuple[tuple[Any, ...], bool]:
    """Positions of which each sample has its own."""
    if samples is None:
        raise EditError(
            f"at= is a tensor, one for each sample, and {_name(fm)} has no samples", **tags(fm)
        )
    device, point, parts = moved.device, True, []
    for part in given:
        if isinstance(part, slice):
            raise EditError(
                "at= has a slice beside each sample's own positions; give them all", **tags(fm)
            )
        if isinstance(part, Tensor):
            if part.dim() not in (1, 2) or part.shape[0] != samples:
                raise EditError(
                    f"at= is a tensor of shape {tuple(part.shape)}: each sample's own position "
                    f"takes ({samples},), several ({samples}, k), and {_name(fm)} has {samples} "
                    "samples; positions that all share are a list",
                    **tags(fm),
                )
            point = point and part.dim() == 1
            parts.append(part if part.dim() == 2 else part.unsqueeze(1))
        else:
            point = point and isinstance(part, int)
            parts.append(torch.as_tensor(part, device=device).reshape(1, -1))
    return (torch.arange(samples, device=device).unsqueeze(1), *parts), point


def _plain(part: Any, moved: Tensor) -> Any:
    """An int, a slice, a list of ints, or a tensor on the map's device."""
    if isinstance(part, np.ndarray):
        part = torch.from_numpy(part)
    if isinstance(part, Tensor):
        if part.dim() == 0:
            return int(part)
        part = part.to(moved.device)
        return part if part.dtype is torch.bool else part.long()
    return list(part) if isinstance(part, range) else part
