"""A map of sequences without their padding, as analyses are to see it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from fmapkit.errors import ArgumentError
from fmapkit.map.feature_map import FeatureMap


def unpadded(fm: FeatureMap, mask: Tensor) -> FeatureMap:
    """The positions of a map that are no padding, one after the other.

    Args:
        fm: a map (samples, positions, ..., filters), or (samples, filters, positions) as Conv1d has
            it; any other is returned as it is.
        mask: (samples, positions), true where there is no padding.

    Returns:
        A map (positions that are kept, ..., filters), of which each entry has its sample's number.
    """
    tensor, axis = positions_first(fm.tensor, fm.filter_dim, mask)
    if axis is None or tensor.shape[:2] != mask.shape:
        return fm
    axis %= tensor.dim()
    if axis < 2:  # it is of samples or positions alone
        return fm
    ids = None if fm.ids is None else kept(fm.ids[:, None].expand(mask.shape), mask)
    return replace(fm, tensor=kept(tensor, mask), filter_dim=axis - 1, ids=ids, mask=mask)


def kept(values: Tensor, mask: Tensor) -> Tensor:
    """The rows that a mask keeps; where it is on the host, no device has to be waited for."""
    at = mask.reshape(-1).nonzero().squeeze(1)
    return values.flatten(0, 1).index_select(0, at.to(values.device, non_blocking=True))


def checked_mask(given: Any, takes: str) -> Tensor:
    """A mask (samples, positions) as booleans.

    Args:
        given: what was given as one.
        takes: who takes it, as the error begins.

    Raises:
        ArgumentError: it is none.
    """
    if not isinstance(given, Tensor) or given.dim() != 2 or given.is_floating_point():
        said = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise ArgumentError(f"{takes} (samples, positions) of booleans or of 0 and 1, not {said}")
    return given != 0


def positions_first(
    tensor: Tensor, axis: int | None, mask: Tensor | None
) -> tuple[Tensor, int | None]:
    """A map and its filter axis, (samples, positions, filters) where it lies as Conv1d has it."""
    lies = mask is not None and axis == 1 and tensor.dim() == 3 and tensor.shape[::2] == mask.shape
    return (tensor.transpose(1, 2), 2) if lies else (tensor, axis)
