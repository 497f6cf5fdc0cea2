"""What is drawn of a map, and of weights: arrays, and nothing of matplotlib."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fmapkit.errors import (
    ArgumentError,
    FilterRangeError,
    MapLookupError,
    NoPassError,
    did_you_mean,
    listed,
)
from fmapkit.plot._images import Array, array_of
from fmapkit.readable import ReadableMap, ReadableMaps, tags
from fmapkit.views import as_grid, strongest, upsampled

# Which filters to draw: the first ones, these, or the strongest.
Choice = int | Iterable[int] | Literal["strongest"] | None
# Bars and heat rows are thin: so many of them are drawn where one tile would be.
THIN = 8


@dataclass(frozen=True, slots=True)
class Picture:
    """What is drawn of one map, or of the weights behind it.

    Attributes:
        values: float, one entry along axis 0 for each filter (or sample): (F,), (F, L), (F, H, W);
            or (F, H, W, 3), colours within [0, 1].
        labels: the number of each of them.
        signed: whether 0 is the middle of the scale; else its lower end.
        caption: what the entries are, and of how many.
        below: an image (H, W) or (H, W, 3) within [0, 1] to lay each of them over.
    """

    values: Array
    labels: Sequence[int]
    signed: bool
    caption: str
    below: Array | None = None

    @property
    def limits(self) -> tuple[float, float]:
        """Ends of the colour scale, the same for all entries."""
        finite = self.values[np.isfinite(self.values)]
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
        if self.signed:
            reach = max(-low, high) or 1.0
            return -reach, reach
        low, high = min(low, 0.0), max(high, 0.0)
        # An all-zero map needs some scale; with this one its tiles have the colour of 0.
        return low, high if high > low else 1.0


def chosen(fm: ReadableMap, filters: Choice, sample: int, limit: int) -> list[int] | None:
    """The filters to draw, in order; None for the first ones."""
    if filters is None:
        return None
    if isinstance(filters, str):
        check_strongest(filters)
        if fm.filter_dim is None or fm.filter_dim % fm.tensor.dim() == 0:
            sample = 0  # there is but one: the filters lie along the first axis
        else:
            check_sample(fm, sample, fm.tensor.shape[0])
        return strongest(fm, limit, sample=sample)
    wanted = [filters] if isinstance(filters, int) else list(filters)
    found = [fm[index].filter for index in wanted[:limit]]
    return [number for number in found if number is not None]


def check_strongest(filters: str) -> None:
    """Raise an `ArgumentError` unless a word that stands for filters is "strongest"."""
    if filters != "strongest":
        raise ArgumentError(
            f"filters must be ints or 'strongest', not {filters!r}"
            f"{did_you_mean(filters, ['strongest'])}",
            candidates=["strongest"],
        )


def latest_maps(maps: ReadableMaps, layers: Any, to: str) -> Sequence[ReadableMap]:
    """The maps of the latest pass that are to be looked at, to "plot" or to "show" them."""
    found = maps.select(layers, step=-1)
    if not found and not maps.layers:
        raise NoPassError(f"nothing to {to}: no maps are held; run the model in the block first")
    if not found:
        known = maps.layers
        raise MapLookupError(
            f"nothing to {to}: {layers!r} is none of {listed(known)}", candidates=known
        )
    return found


def of_map(
    fm: ReadableMap,
    sample: int,
    max_filters: int,
    filters: Choice = None,
    grid: tuple[int, int] | None = None,
    below: Array | None = None,
) -> Picture:
    """What is drawn of a map.

    Args:
        sample: which sample of the batch; of one filter's map the first one drawn.
        filters: which; None for the first ones.
        grid: rows and columns of the patches that its tokens are.
        below: the image to lay it over.
    """
    if grid is not None:
        if fm.filter is not None:
            raise ArgumentError("grid= goes with the map of all filters: fm.plot(filters=…)")
        fm = as_grid(fm, *grid)
    if below is not None:
        fm = upsampled(fm, below.shape[:2])
    tensor = fm.tensor.detach()
    one_filter = fm.filter is not None
    if one_filter and filters is not None:
        raise FilterRangeError(
            f"it is filter {fm.filter} already: filters= chooses among all",
            filter=fm.filter,
            **tags(fm),
        )
    tensor, _ = by_filter(fm, tensor, None if one_filter and tensor.ndim else sample)
    total, known = tensor.shape[0], None if one_filter else fm.filters
    what = "samples" if one_filter else "entries" if known is None else "filters"
    every = range(total) if known is None else known
    limit = max_filters if tensor.ndim == 3 else max_filters * THIN
    labels = chosen(fm, filters, sample, limit)
    if labels is None:
        first = 0
        if one_filter and total:
            check_sample(fm, sample, total)
            first = sample % total
        labels = list(every[first : first + limit])
    # On the CPU, and no more than is drawn: the rest of a large map need not travel.
    values = array_of(tensor[[every.index(label) for label in labels]])
    caption = _counted(len(values), total, what)
    caption += ", the strongest" if isinstance(filters, str) else ""
    return Picture(values, labels, is_signed(fm, values), caption, below)


def by_filter(fm: ReadableMap, tensor: Tensor, sample: int | None) -> tuple[Tensor, str]:
    """What is drawn along axis 0, with at most two axes after it; and what was left out.

    Args:
        sample: whose filters lie along axis 0; None where it counts samples, of one filter.
    """
    axis = 0 if sample is None else fm.filter_dim
    axis = None if axis is None else axis % tensor.ndim
    # Filters on axis 0 are those of an unbatched layer; else the samples lie there.
    if sample is not None and axis != 0 and tensor.ndim > (1 if axis is None else 0):
        check_sample(fm, sample, tensor.shape[0])
        tensor = tensor.select(0, sample)
        axis = axis - 1 if axis is not None else None
    if axis is None:
        axis = 0
        if tensor.ndim in (0, 2):  # one number, or one image
            tensor = tensor.unsqueeze(0)
    tensor = tensor.movedim(axis, 0)
    note = ""
    while tensor.ndim > 3:  # a volume is shown by its middle slice
        middle = tensor.shape[1] // 2
        note += f", slice {middle} of {tensor.shape[1]}"
        tensor = tensor.select(1, middle)
    return tensor, note


def _counted(count: int, total: int, what: str) -> str:
    return f"{total} {what}" if count == total else f"{count} of {total} {what}"


def is_signed(fm: ReadableMap, values: Array) -> bool:
    """Whether both signs count alike: not in what a GELU leaves below 0."""
    if fm.kind != "activation":
        return True
    finite = values[np.isfinite(values)]
    return bool(finite.size and finite.min() < -0.5 * abs(finite.max()))


def of_weights(
    weight: Tensor,
    labels: Sequence[int],
    total: int,
    shape: Sequence[int] | None = None,
    scale: Literal["layer", "filter"] = "layer",
) -> Picture:
    """What is drawn of weights.

    Of three inputs, a kernel is a picture in colours around grey; of one, its values; of more, the
    root of the sum of their squares over the inputs. A row of weights is one row, unless `shape`
    makes an image of it.

    Args:
        weight: (filters, ...) of those to be drawn.
        shape: of what a row of weights is for: (channels, rows, columns) or (rows, columns).
        scale: "layer": one for all; "filter": each has its own.
    """
    if shape is not None:
        size = tuple(int(n) for n in shape)
        if weight[0].numel() != torch.Size(size).numel() or len(size) not in (2, 3):
            raise ArgumentError(
                f"shape={size} is of {torch.Size(size).numel()} inputs, and a filter has "
                f"{weight[0].numel()} weights"
            )
        weight = weight.reshape(len(weight), *size)
        weight = weight.unsqueeze(1) if len(size) == 2 else weight
    while weight.ndim > 4:  # a volume is shown by its middle slice
        weight = weight.select(2, weight.shape[2] // 2)
    values = array_of(weight)
    caption = _counted(len(values), total, "filters' weights")
    if scale == "filter" and values.size:
        reach = np.abs(values).reshape(len(values), -1).max(1)
        values = values / np.where(reach > 0, reach, 1).reshape(-1, *[1] * (values.ndim - 1))
    if values.ndim == 4 and values.shape[1] == 3:
        reach = np.nanmax(np.abs(values), initial=0.0) or 1.0
        coloured = np.clip(0.5 + values.transpose(0, 2, 3, 1) / (2 * reach), 0, 1)
        return Picture(coloured, labels, True, f"{caption}, in colours")
    if values.ndim == 4 and values.shape[1] == 1:
        return Picture(values[:, 0], labels, True, caption)
    if values.ndim == 4:
        size_of = np.sqrt(np.square(values).sum(1))
        return Picture(size_of, labels, False, f"{caption}, √Σw² over {values.shape[1]} inputs")
    return Picture(values, labels, True, caption)


def meaning(fm: ReadableMap) -> str:
    """What a map is: z, a, or its kind."""
    if fm.kind == "preactivation":
        return "z"
    if fm.kind == "activation":
        return f"a = {fm.nonlinearity or 'σ'}(z)"
    return fm.kind


def by_call(found: Iterable[ReadableMap]) -> list[list[ReadableMap]]:
    """The maps of each call of each layer, in the order of execution."""
    groups: dict[tuple[str, int], list[ReadableMap]] = {}
    for fm in found:
        groups.setdefault((fm.layer, fm.call), []).append(fm)
    return list(groups.values())


def leading(own: Sequence[ReadableMap]) -> ReadableMap:
    """The map of a layer by which its strongest filters are chosen: the activation, if any."""
    return next((fm for fm in reversed(own) if fm.kind == "activation"), own[-1])


def check_sample(fm: ReadableMap, sample: int, count: int) -> None:
    """Raise an `ArgumentError` unless there is such a sample."""
    if not -count <= sample < count:
        raise ArgumentError(
            f"sample {sample} is out of range: the {fm.kind} of layer {fm.layer!r} has shape "
            f"{tuple(fm.tensor.shape)}, so {count} samples",
            **tags(fm),
        )
