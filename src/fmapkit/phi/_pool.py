"""From a feature map to a feature vector: what `feature_map(pool=...)` does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fmapkit.errors import ArgumentError, FilterRangeError, did_you_mean, listed
from fmapkit.map import FeatureMap
from fmapkit.readable import tags

Pool = str | Callable[[Tensor], Tensor] | None

POOLS = ("mean", "max", "flatten", "token")


def checked(pool: Any) -> Pool:
    """A way to pool, if it is of an allowed form."""
    if pool is None or pool in POOLS or (callable(pool) and not isinstance(pool, type)):
        return pool  # type: ignore[no-any-return]
    hint = did_you_mean(pool, POOLS)
    raise ArgumentError(
        f"pool must be one of {listed(POOLS)}, a function or None, not {pool!r}{hint}",
        candidates=POOLS,
    )


def picked(fm: FeatureMap, filters: tuple[int, ...] | None) -> Tensor:
    """The map's tensor, or some filters of it, along the axis where they lie."""
    if filters is None:
        return fm.tensor
    if fm.filters is None or fm.filter_dim is None:
        raise ArgumentError(
            f"filters= was given, and the {fm.kind} of layer {fm.layer!r} has no single filter "
            "axis",
            **tags(fm),
        )
    there = list(fm.filters)
    places = []
    for wanted in filters:
        index = wanted if wanted >= 0 else there[-1] + 1 + wanted
        if index not in there:
            raise FilterRangeError(
                f"filters={wanted} is out of range for the {fm.kind} of layer {fm.layer!r}, which "
                f"has {len(there)} filters ({there[0]} to {there[-1]})",
                filter=wanted,
                candidates=there,
                **tags(fm),
            )
        places.append(there.index(index))
    # By slices: an index tensor would have to be sent to the device, which waits for it.
    pieces = [fm.tensor.narrow(fm.filter_dim, place, 1) for place in places]
    return torch.cat(pieces, fm.filter_dim)


def pooled(fm: FeatureMap, tensor: Tensor, pool: Pool) -> Tensor:
    """One vector for each sample, if the map has axes for that."""
    if pool is None:
        return tensor
    if callable(pool):
        return pool(tensor)
    if pool == "flatten":
        return tensor.flatten(1)
    dim = fm.filter_dim
    if dim is None:
        if tensor.dim() <= 2:
            return tensor
        raise ArgumentError(
            f"pool={pool!r} needs to know which axis has the filters, and the {fm.kind} of layer "
            f"{fm.layer!r}, of shape {tuple(tensor.shape)}, has no single one; give a function",
            **tags(fm),
        )
    dim %= tensor.dim()
    if pool == "token":
        if tensor.dim() != 3 or dim != 2:
            raise ArgumentError(
                f"pool='token' takes the first token of (samples, tokens, features), and the "
                f"{fm.kind} of layer {fm.layer!r} has shape {tuple(tensor.shape)} with its filters "
                f"along axis {dim}; give a function",
                **tags(fm),
            )
        return tensor[:, 0]
    # Filters on axis 0 are those of an input without a batch axis.
    others = [d for d in range(tensor.dim()) if d != dim and (d > 0 or dim == 0)]
    if not others:
        return tensor
    return tensor.mean(others) if pool == "mean" else tensor.amax(others)
