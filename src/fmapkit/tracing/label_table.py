"""What each tensor of a traced pass carries: filters of a layer, a weight, or nothing."""

from __future__ import annotations

import weakref
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fmapkit.model import Names
from fmapkit.provenance import (
    NOWHERE,
    STOP,
    Carried,
    ChannelLabel,
    ChannelLayout,
    Label,
    ParamLabel,
    is_same,
)
from fmapkit.torchlib.memory import storage_of
from fmapkit.torchlib.nested import leaves
from fmapkit.torchlib.sharded import is_dtensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class LabelTable:
    """The labels of one pass; they keep no tensor alive."""

    def __init__(self, names: Names) -> None:
        self._names = names
        self._whole: dict[int, ParamLabel] = {}  # of parameters, as they are
        self._known: dict[int, tuple[weakref.ref[Tensor], Label]] = {}

    def of(self, value: Any) -> Label:
        """Channel label, weight, or None for a constant."""
        found = self._known.get(id(value))
        if found is not None and found[0]() is value is not None:
            # A piece of a flat parameter is the parameter that it was before.
            label = found[1]
            if not (isinstance(label, ParamLabel) and self._names.in_flat(value)):
                return label
        whole = self._whole.get(id(value))
        if whole is not None and whole.parameter is value:
            return whole
        if isinstance(value, Tensor) and self._names.is_parameter(value):
            whole = self._whole[id(value)] = ParamLabel.whole(value)
            return whole
        return None

    def channels(self, value: Any) -> ChannelLabel | None:
        """The channel label alone, for who does not ask whether it is a weight."""
        found = self._known.get(id(value))
        if found is None or found[0]() is not value:
            return None
        return found[1] if isinstance(found[1], ChannelLabel) else None

    def none_of(self, ids: frozenset[int]) -> bool:
        """Whether none of these tensors, told by their ids, has been given a label in this pass."""
        return ids.isdisjoint(self._known)

    def put(self, value: Any, label: Carried) -> None:
        """What a result carries; nested like the result."""
        if isinstance(value, Tensor):
            if isinstance(label, (ChannelLabel, ParamLabel)):
                self._known[id(value)] = (weakref.ref(value), label)
        elif isinstance(value, (tuple, list)) and isinstance(label, list):
            for v, t in zip(value, label, strict=False):
                self.put(v, t)

    def seen(self) -> dict[int, tuple[weakref.ref[Tensor], Label]]:
        """All labels that there are now, by the ids of tensors."""
        return dict(self._known)

    def others_changed(
        self, seen: dict[int, tuple[weakref.ref[Tensor], Label]], known: Collection[int]
    ) -> bool:
        """Whether a tensor, but those known by id, carries something else than was seen."""
        for key, (ref, label) in seen.items():
            now = self._known.get(key)
            if now is not None and key not in known and not is_same(now[1], label):
                if now[0]() is ref() is not None:
                    return True
        return False

    def written(self, target: Tensor, before: Label) -> None:
        """Into a tensor other filters were written than it had: its memory may be others', too.

        A view has rows of several layers then, or other filters of its own layer. The tensor has
        its new label already.
        """
        now = self.of(target)
        if not isinstance(now, ChannelLabel) or is_same(now, before):
            return
        if isinstance(before, ChannelLabel) and before.axes == now.axes:
            if before.origin.name == now.origin.name:
                return
        memory, reach = storage_of(target), _reach(target)
        for ref, label in tuple(self._known.values()):
            other = ref()
            if other is None or other is target or not isinstance(label, ChannelLabel):
                continue
            first, last = _reach(other)
            if storage_of(other) != memory or first > reach[1] or last < reach[0]:
                continue
            if now.origin.name == label.origin.name and now.origin.kind != "none":
                self.put(other, ChannelLabel(label.origin, gathered=True))
            elif label.origin.kind != "none":
                self.put(other, ChannelLabel(NOWHERE, label.axes, gathered=True))

    def enter(self, args: Any, kwargs: Any) -> None:
        """The pass begins: whatever comes in depends on the input, and has no layer yet."""
        for _, tensor in leaves((args, kwargs)):
            if self.of(tensor) is None:
                self.put(tensor, STOP)

    def moved(self, before: Any, after: Any) -> None:
        """A hook of torch's redistributed tensors: what they carry goes along."""
        for (_, old), (_, new) in zip(leaves(before), leaves(after), strict=False):
            label = self.of(old)
            if old is not new and isinstance(label, ChannelLabel):
                self.put(new, ChannelLabel(label.origin, _local_axes(label.axes, old, new)))

    def lent(self, tensor: Tensor) -> bool:
        """Whether its memory is gone once its module has run: a parameter's, under FSDP."""
        if not self._names.lends or not isinstance(self.of(tensor), ParamLabel):
            return False
        return self._names.lent or bool(self._names.in_flat(tensor))

    def end(self) -> None:
        """Forget them."""
        self._known.clear()
        self._whole.clear()


def _reach(tensor: Tensor) -> tuple[int, int]:
    """The first and the last element of its storage that a tensor may have."""
    if tensor.layout is not torch.strided or not tensor.numel():
        return 0, 0
    first = tensor.storage_offset()
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return int(first), int(first + sum((size - 1) * stride for size, stride in pairs))


def _local_axes(axes: ChannelLayout | None, before: Tensor, after: Tensor) -> ChannelLayout | None:
    """The filters of a tensor, along `axes` of `before`, that has been redistributed.

    It is the same tensor in another layout, or this rank's part of it.
    """
    if axes is None or before.shape == after.shape:
        return axes
    if not is_dtensor(before) or is_dtensor(after) or before.dim() != after.dim():
        return None
    mesh: DeviceMesh = before.device_mesh  # type: ignore[attr-defined]
    cut = [d for d in range(before.dim()) if before.shape[d] != after.shape[d]]
    if mesh.ndim != 1 or len(cut) != 1:
        return None
    if all(part.dim != cut[0] for part in axes.parts):
        return axes
    # How long this rank's part is, and where it starts: as `torch.chunk`.
    total = before.shape[cut[0]]
    length = -(-total // mesh.size())
    start = min(mesh.get_local_rank() * length, total)
    size = min(length, total - start)
    return axes.slice(cut[0], start, size) if size == after.shape[cut[0]] else None
