"""The tensors of a pass that is compared with others: each in its slot, in the order they came."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

from fmapkit._operands import FREE, OWN
from fmapkit._origin import Tag
from fmapkit._tags import Tags

__all__ = ["Seen"]


class Seen:
    """Slots; they keep no tensor alive.

    Args:
        tags: of the pass; they know its parameters.

    Attributes:
        refs: the tensor in each slot.
        carry: what it carries.
        ids: the latest slot of each, by the tensor's id.
    """

    __slots__ = ("_tags", "carry", "ids", "refs")

    def __init__(self, tags: Tags) -> None:
        self._tags = tags
        self.refs: list[weakref.ref[Tensor]] = []
        self.carry: list[Tag] = []
        self.ids: dict[int, int] = {}

    def put(self, tensor: Tensor, tag: Tag) -> None:
        """The next slot; a tensor that now carries something else gets another one."""
        self.ids[id(tensor)] = len(self.refs)
        self.refs.append(weakref.ref(tensor))
        self.carry.append(tag)

    def slot(self, tensor: Tensor) -> int:
        """The latest slot of a tensor; FREE if it has none."""
        found = self.ids.get(id(tensor), FREE)
        return found if found >= 0 and self.refs[found]() is tensor else FREE

    def source(self, tensor: Tensor) -> int:
        """Its slot, OWN or FREE."""
        found = self.slot(tensor)
        return OWN if found == FREE and self._tags.owns(tensor) else found

    def tag(self, value: Any) -> Tag:
        """What a value carries."""
        if not isinstance(value, Tensor):
            return None
        found = self.slot(value)
        return self.carry[found] if found >= 0 else self._tags.of(value)

    def clear(self) -> None:
        """The pass has ended."""
        self.refs.clear()
        self.carry.clear()
        self.ids.clear()
