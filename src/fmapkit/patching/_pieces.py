"""Which pieces of the maps are patched: layer by position by group of filters."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from fmapkit.editing import Where
from fmapkit.errors import ArgumentError
from fmapkit.map import FeatureMap

Key = tuple[str, int, str]  # the layer, the call, the path


class PatchPiece(NamedTuple):
    """A map, and which part of it."""

    key: Key
    where: Where


def key_of(fm: FeatureMap) -> Key:
    """What tells a map of one kind from the others of its pass."""
    return fm.layer, fm.call, fm.path


def named(key: Key, keys: Iterable[Key]) -> str:
    """A map's name in a result: its layer, with the call where there are several, and its path."""
    layer, call, path = key
    several = len({other[1] for other in keys if other[0] == layer}) > 1
    return f"{layer}{path}" + (f" (call {call})" if several else "")


def pieces_of(
    maps: Mapping[Key, FeatureMap], where: Where, positions: Any, filters: Any
) -> tuple[list[PatchPiece], tuple[Any, ...], tuple[Any, ...]]:
    """All pieces, in the order of the result: of each map each position, and of that each group.

    Args:
        maps: what is to be put in, by layer, call and path.
        where: which maps; of which filters and positions is said by the next two.
        positions: "each", several of what `Where(at=...)` takes, or None.
        filters: several of what `Where(filter=...)` takes, or None.

    Returns:
        The pieces; the positions, none for whole maps; the filters, none for all of them.
    """
    if isinstance(positions, str) and positions == "each":
        places = tuple(range(_count(maps, where)))
    else:
        places = _several(positions, "positions", "'each', ")
    groups = tuple(k if isinstance(k, int) else tuple(k) for k in _several(filters, "filters"))
    axis, kind = where.filter_axis, where.kind
    parts = [
        Where("", kind, group, at=at, filter_axis=axis)
        for at, group in itertools.product(places or (None,), groups or (None,))
    ]
    return [PatchPiece(key, part) for key in maps for part in parts], places, groups


def _several(given: Any, name: str, also: str = "") -> tuple[Any, ...]:
    if given is None:
        return ()
    if isinstance(given, (str, int)) or not isinstance(given, Iterable):
        raise ArgumentError(f"{name} must be {also}several of these in a list, or None")
    found = tuple(given)
    if not found:
        raise ArgumentError(f"{name}=[] leaves nothing to patch; None, the default, means all")
    return found


def _count(maps: Mapping[Key, FeatureMap], where: Where) -> int:
    """How many positions each map has, if these lie along one axis and are as many in each."""
    counts: dict[int, Key] = {}
    for key, fm in maps.items():
        rank, filters = fm.tensor.dim(), fm.filter_dim
        if where.filter_axis is not None:
            filters = where.filter_axis % rank
        if filters is None:
            raise ArgumentError(
                f"positions='each': which axis of the {fm.kind} of {named(key, maps)!r} counts "
                "filters is not told by the data: say it with filter_axis=-1"
            )
        axes = [d for d in range(1, rank) if d != filters]
        if len(axes) != 1:
            raise ArgumentError(
                f"positions='each' is for maps with one axis of positions, and that of "
                f"{named(key, maps)!r}, of shape {tuple(fm.shape)}, has {len(axes)}: list them"
            )
        counts.setdefault(fm.shape[axes[0]], key)
    if len(counts) > 1:
        told = ", ".join(f"{named(key, maps)!r} has {count}" for count, key in counts.items())
        raise ArgumentError(f"positions='each' needs maps of as many positions: {told}")
    return next(iter(counts))
