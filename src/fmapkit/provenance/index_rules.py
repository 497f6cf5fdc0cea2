"""Rules for what reads and writes places of a tensor by an index: messages, experts, padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmapkit.provenance.labels import NOWHERE, STOP, ChannelLabel, Lookup, channels_of
from fmapkit.provenance.layout import ChannelLayout
from fmapkit.provenance.rule_basics import FunctionCall, aligned, lost_if_none
from fmapkit.provenance.vocabulary import ADDING_WRITES
from fmapkit.torchlib.memory import storage_of


def getitem(channels: ChannelLabel, x: Tensor, call: FunctionCall, label: Lookup) -> Any:
    """Some places of a tensor, by an index."""
    axes = channels.axes
    if axes is not None:
        axes = _indexed(axes, _numbered(call.args[1], x, call.out), x.dim())
    if axes is None or not axes.fit(call.out.shape):
        return STOP
    return ChannelLabel(channels.origin, axes)


def is_number(item: Any) -> bool:
    """A tensor that is one whole number: torch takes it as it takes an int."""
    whole = isinstance(item, Tensor) and not item.dim() and not item.is_floating_point()
    return whole and item.dtype not in (torch.bool, torch.uint8)


def _numbered(index: Any, x: Tensor, out: Tensor) -> list[Any]:
    """The items of an index; tensors that are one number each replaced by what they are.

    Nobody waits for the device: where the result begins in the memory of `x` tells the numbers.
    """
    items = [*map(_as_torch_has_it, index if isinstance(index, tuple) else [index])]
    tensors = [i for i in items if isinstance(i, (Tensor, list))]
    if not tensors or not all(map(is_number, tensors)) or not _views(out, x):
        return items
    begins, dim = out.storage_offset() - x.storage_offset(), 0
    numbers: dict[int, int] = {}  # the axis of each: its place in the index
    for place, item in enumerate(items):
        if item is Ellipsis:
            dim = x.dim() - sum(i is not None for i in items[place + 1 :])
        elif is_number(item):
            numbers[dim] = place
            dim += 1
        elif item is not None:
            size = x.shape[dim]
            first = item.indices(size)[0] if isinstance(item, slice) else int(item) % size
            begins -= first * x.stride(dim)
            dim += 1
    if not all(isinstance(n, int) for n in (begins, *x.stride())):
        return items  # of a fake tensor
    found = list(items)
    for dim in sorted(numbers, key=x.stride, reverse=True):
        last = x.shape[dim] - 1
        found[numbers[dim]] = min(begins // x.stride(dim), last) if x.stride(dim) else 0
        begins -= found[numbers[dim]] * x.stride(dim)
    return found if not begins else items


def _as_torch_has_it(item: Any) -> Any:
    """An item of an index; an array of NumPy's, or a row of numbers, as what torch makes of it."""
    if isinstance(item, np.ndarray):
        return torch.tensor(item.tolist(), dtype=torch.bool if item.dtype == bool else torch.long)
    return list(item) if isinstance(item, (tuple, range)) else item


def _views(out: Any, x: Tensor) -> bool:
    """Whether a result lies in the memory of the operand."""
    plain = isinstance(out, Tensor) and out.layout == x.layout == torch.strided
    return plain and not x.is_nested and storage_of(out) == storage_of(x)


def _indexed(axes: ChannelLayout | None, index: Sequence[Any], rank: int) -> ChannelLayout | None:
    """Where the filters of a tensor with so many axes lie when it is indexed; None if unknown."""
    items = list(index)
    advanced = [i for i, item in enumerate(items) if _is_advanced(item)]
    if advanced and advanced != list(range(advanced[0], advanced[-1] + 1)):
        return None  # the axis that they make together goes to the front
    if not any(i is Ellipsis for i in items):
        items.append(Ellipsis)
    at = 0  # the axis of the result that the next item makes
    for place, item in enumerate(items):
        if axes is None:
            return None
        if item is None:
            axes = axes.insert(at)
            at += 1
        elif item is Ellipsis:
            at += rank - sum(map(_width, items))
        elif isinstance(item, slice):
            part = next((p for p in axes.parts if p.dim == at), None)
            if part is not None:
                start, stop, step = item.indices(part.size)
                axes = axes.slice(at, start, len(range(start, stop, step)), step)
            at += 1
        elif place in advanced[1:]:
            continue
        elif place in advanced:
            together = [items[i] for i in advanced]
            gone = list(range(at, at + sum(map(_width, together))))
            if any(p.dim in gone for p in axes.parts):
                return None
            made = max(map(_rank, together))
            removed = axes.remove(gone)
            axes = removed.insert(at, made) if removed is not None else None
            at += made
        elif is_number(item):  # which, nobody knows
            axes = None if any(p.dim == at for p in axes.parts) else axes.remove([at])
        elif isinstance(item, bool):
            return None
        else:
            axes = axes.select(at, int(item))
    return axes


def _is_advanced(item: Any) -> bool:
    return isinstance(item, (Tensor, list)) and not is_number(item)


def _width(item: Any) -> int:
    """How many axes an item of an index is for."""
    if item is None or item is Ellipsis:
        return 0
    return item.dim() if isinstance(item, Tensor) and item.dtype == torch.bool else 1


def _rank(item: Any) -> int:
    """How many axes an advanced index makes."""
    if isinstance(item, list):
        return torch.tensor(item).dim()
    return 1 if item.dtype == torch.bool else item.dim()


def write(channels: ChannelLabel, x: Tensor, call: FunctionCall, label: Lookup) -> Any:
    """What the target carried, or where it carried nothing, what is written into it.

    A sum belongs to its first operand, the target. Where layers write into memory that had no
    filters, each its own rows, the whole is no one layer's.
    """
    place = 2 if call.name in ("__setitem__", "index_put", "masked_scatter") else 3
    target = call.argument(0, "input", "self")
    source = call.argument(place, "source", "src", "values", "value", "tensor")
    own, new = channels_of(label, target), channels_of(label, source)
    if own is None:
        if new is None:
            return STOP
        found = _into(call, new, source, target)
        return ChannelLabel(found.origin, found.axes, gathered=True)
    if new is None or new.origin.kind == "none":
        return own
    if new.origin.name == own.origin.name:
        if own.gathered and _into(call, new, source, target).axes != own.axes:
            return ChannelLabel(own.origin, gathered=True)  # other filters of the same layer
        return own
    adds = call.name in ADDING_WRITES
    if call.name == "index_put":
        adds = bool(call.argument(3, "accumulate"))
    if adds and not own.gathered:
        return own
    return ChannelLabel(NOWHERE, own.axes, gathered=True)


def _into(
    call: FunctionCall, channels: ChannelLabel, source: Tensor, target: Tensor
) -> ChannelLabel:
    """Filters that are written into a tensor that had none: they lie there as they lay."""
    if channels.axes is None:
        return STOP
    if call.name in ("__setitem__", "index_put"):
        index = call.args[1] if len(call.args) > 1 else call.kwargs.get("indices")
        return lost_if_none(channels, _put(channels.axes, source, index, tuple(target.shape)))
    dim = call.argument(1, "dim")
    if isinstance(dim, int) and any(p.dim == dim % source.dim() for p in channels.axes.parts):
        return STOP
    return aligned(channels, source, target) if source.dim() <= target.dim() else STOP


def _put(
    axes: ChannelLayout, source: Tensor, index: Any, shape: Sequence[int]
) -> ChannelLayout | None:
    """Where filters lie in a tensor of this shape that they are written into, at an index."""
    items = [*map(_as_torch_has_it, index if isinstance(index, (tuple, list)) else [index])]
    if any(isinstance(i, bool) for i in items):
        return None
    there = {}
    for dim, size in enumerate(shape):
        found = _indexed(ChannelLayout.single(dim, size), items, len(shape))
        if (
            found is not None
            and found.parts
            and found == ChannelLayout.single(found.parts[0].dim, size)
        ):
            there[found.parts[0].dim] = dim
    advanced = [i for i in items if _is_advanced(i)]
    made = sum(isinstance(i, slice) or i is None for i in items)
    made += max(map(_rank, advanced), default=0)
    rank = len(shape) - sum(map(_width, items)) + made
    moved = []
    for part in axes.parts:
        place = there.get(part.dim + rank - source.dim())
        if place is None or shape[place] != part.size:
            return None
        moved.append(part.at(place))
    return ChannelLayout(tuple(sorted(moved, key=lambda p: p.dim)), axes.offset)
