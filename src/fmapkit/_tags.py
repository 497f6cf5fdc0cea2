"""What each tensor of a traced pass carries: a flow, a weight, or nothing."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

from fmapkit._names import Names
from fmapkit._nested import leaves
from fmapkit._origin import STOP, Carried, Flow, Tag, Weight
from fmapkit._sharded import local_axes

__all__ = ["Tags"]


class Tags:
    """The tags of one pass; they keep no tensor alive."""

    __slots__ = ("_known", "_names")

    def __init__(self, names: Names) -> None:
        self._names = names
        self._known: dict[int, tuple[weakref.ref[Tensor], Tag]] = {}

    def of(self, value: Any) -> Tag:
        """Flow, weight, or None for a constant."""
        found = self._known.get(id(value))
        if found is not None and found[0]() is value and isinstance(value, Tensor):
            # A piece of a flat parameter is the parameter that it was before.
            tag = found[1]
            if not (isinstance(tag, Weight) and self._names.in_flat(value)):
                return tag
        if isinstance(value, Tensor) and self._names.is_parameter(value):
            return Weight.whole(value)
        return None

    def flow(self, value: Any) -> Flow | None:
        """The flow alone: for who does not ask whether it is a weight."""
        found = self._known.get(id(value))
        if found is None or found[0]() is not value:
            return None
        return found[1] if isinstance(found[1], Flow) else None

    def none_of(self, ids: frozenset[int]) -> bool:
        """Whether none of these tensors, told by their ids, has been given a tag in this pass."""
        return ids.isdisjoint(self._known)

    def put(self, value: Any, tag: Carried) -> None:
        """What a result carries; nested like the result."""
        if isinstance(value, Tensor):
            if isinstance(tag, (Flow, Weight)):
                self._known[id(value)] = (weakref.ref(value), tag)
        elif isinstance(value, (tuple, list)) and isinstance(tag, list):
            for v, t in zip(value, tag, strict=False):
                self.put(v, t)

    def enter(self, args: Any, kwargs: Any) -> None:
        """The pass begins: whatever comes in depends on the input, and has no layer yet."""
        for _, tensor in leaves((args, kwargs)):
            if self.of(tensor) is None:
                self.put(tensor, STOP)

    def moved(self, before: Any, after: Any) -> None:
        """A hook of torch's redistributed tensors: what they carry goes along."""
        for (_, old), (_, new) in zip(leaves(before), leaves(after), strict=False):
            tag = self.of(old)
            if old is not new and isinstance(tag, Flow):
                self.put(new, Flow(tag.origin, local_axes(tag.axes, old, new)))

    def lent(self, tensor: Tensor) -> bool:
        """Whether its memory is gone once its module has run: a parameter's, under FSDP."""
        if not self._names.lends or not isinstance(self.of(tensor), Weight):
            return False
        return self._names.lent or bool(self._names.in_flat(tensor))

    def end(self) -> None:
        """Forget them."""
        self._known.clear()
