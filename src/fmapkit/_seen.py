"""The tensors of a pass that is compared with others: each in its slot, in the order they came."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
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
        refs: the tensor in each slot; one that now carries something else gets another one.
        carry: what it carries.
    """

    __slots__ = ("_indexed", "_latest", "_tags", "carry", "refs")

    def __init__(self, tags: Tags) -> None:
        self._tags = tags
        self.refs: list[weakref.ref[Tensor]] = []
        self.carry: list[Tag] = []
        self._latest: dict[int, int] = {}  # the latest slot of each, by the tensor's id,
        self._indexed = 0  # as far as somebody has asked

    def note(self, tensors: Sequence[Tensor], tags: Sequence[Any]) -> None:
        """The next slots: for those of the tensors that carry something."""
        for tensor, tag in zip(tensors, tags, strict=True):
            if tag is not None:
                self.refs.append(weakref.ref(tensor))

    def put(self, tensors: Sequence[Tensor], tags: Sequence[Tag]) -> None:
        """The same, and what they carry."""
        self.note(tensors, tags)
        self.carry += [tag for tag in tags if tag is not None]

    def slot(self, tensor: Tensor) -> int:
        """The latest slot of a tensor; FREE if it has none."""
        refs, latest = self.refs, self._latest
        for place in range(self._indexed, len(refs)):
            known = refs[place]()
            if known is not None:
                latest[id(known)] = place
        self._indexed = len(refs)
        found = latest.get(id(tensor), FREE)
        return found if found >= 0 and refs[found]() is tensor else FREE

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
        self._latest.clear()
        self._indexed = 0
