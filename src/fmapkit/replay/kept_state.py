"""What a model keeps of earlier passes and reads in later ones: a cache of keys and values.

Its form is a part of what kind of call it is, and the sizes of its tensors are sizes of the call.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from fmapkit.paths import Sizes
from fmapkit.replay.call_form import TOLD
from fmapkit.replay.escapes import keys_of, members_of, own_attributes
from fmapkit.torchlib.memory import storage_of
from fmapkit.torchlib.nested import leaves, modules_in
from fmapkit.torchlib.tensor_spec import form_of
from fmapkit.torchlib.transforms import is_shapeless

_MARK = "\0"  # before their places: no path into an output begins so
_DEEPEST = 9
_MOST = 1_000  # objects
_NUMBERS = frozenset({int, float})


class KeptState:
    """Where calls of one module keep tensors: in attributes, and in what they are given."""

    def __init__(
        self,
        region: nn.Module,
        attributes: tuple[tuple[nn.Module, str], ...] = (),
        arguments: tuple[int | str, ...] = (),
    ) -> None:
        self._region = region
        self._buffers = [
            m._buffers
            for m in (modules_in(region) if attributes or arguments else ())
            if m._buffers and not isinstance(m, torch.jit.ScriptModule)
        ]
        self._attributes = attributes  # modules, each with the name of one
        self._arguments = arguments  # places and names of arguments

    def __bool__(self) -> bool:
        return bool(self._attributes or self._arguments)

    def with_more(
        self, attributes: Iterable[tuple[nn.Module, str]], arguments: Iterable[int | str]
    ) -> KeptState | None:
        """The same, with these places; None if they are known."""
        more = dict.fromkeys((*self._attributes, *attributes))
        others = dict.fromkeys((*self._arguments, *arguments))
        known = len(more) + len(others) == len(self._attributes) + len(self._arguments)
        return None if known else KeptState(self._region, tuple(more), tuple(others))

    def leaves(self) -> list[tuple[str, Tensor]]:
        """The tensors in attributes, each by its place."""
        held = [module.__dict__.get(name) for module, name in self._attributes]
        return [found for n, value in enumerate(held) for found in leaves(value, f"{_MARK}{n}")]

    def form(self, args: Any, kwargs: Any, given: Sequence[Tensor]) -> tuple[Any, Sizes]:
        """The form of what is kept as a call begins, and the sizes of its tensors, each shape once.

        The form is None where there is too much to look at before each pass, or something without
        an order.
        """
        buffers = [t for held in self._buffers for t in held.values() if t is not None]
        form = _KeptForm([*given, *buffers])
        held = [module.__dict__.get(name) for module, name in self._attributes]
        for place in self._arguments:
            if isinstance(place, str):
                held.append(kwargs.get(place))
            elif place < len(args):
                held.append(args[place])
        found = form.of_all(held)
        whole = form.ordered and form.count <= _MOST
        return ((found, form.ranks()) if whole else None), form.sizes()


class _KeptForm:
    """The form of what is kept, tensors numbered in the order of their first mention."""

    def __init__(self, given: Sequence[Tensor]) -> None:
        self.count = 0  # of objects that were looked at
        # Everything has a place that is the same in each pass: members of a set have none.
        self.ordered = True
        self._tensors: dict[int, int] = {}
        self._storages: dict[int, int] = {}
        self._seen: dict[int, int] = {}
        self._shapes: dict[tuple[int, ...], int] = {}
        self._numbers: list[float] = []
        for tensor in given:
            self._number(tensor)

    def sizes(self) -> Sizes:
        """Those of all tensors."""
        return tuple([size for shape in self._shapes for size in shape])

    def ranks(self) -> tuple[int, ...]:
        """Which numbers are greater than which: Python itself sorts by that, and counters grow."""
        ranks = {number: rank for rank, number in enumerate(sorted(set(self._numbers)))}
        return tuple([ranks[number] for number in self._numbers])

    def _number(self, tensor: Tensor) -> tuple[int, int]:
        storage = -1 if is_shapeless(tensor) else storage_of(tensor)
        at = self._tensors.setdefault(id(tensor), len(self._tensors))
        return at, self._storages.setdefault(storage, len(self._storages))

    def of_all(self, values: Sequence[Any], depth: int = 0) -> tuple[Any, ...]:
        """The forms of values; nothing more is told once there are too many."""
        self.count += len(values)
        if self.count > _MOST:
            return ()
        return tuple([(type(v), v) if type(v) in TOLD else self._of(v, depth) for v in values])

    def _of(self, value: Any, depth: int) -> Any:
        """The form of a container, of an object, or of a number."""
        kind = type(value)
        if kind in _NUMBERS:
            self._numbers.append(value)
            return kind
        if isinstance(value, Tensor):
            if is_shapeless(value):
                return kind, self._number(value)
            shape = self._shapes.setdefault(tuple(value.shape), len(self._shapes))
            return kind, self._number(value), shape, form_of(value)
        if depth > _DEEPEST:
            return kind
        if id(value) in self._seen:
            return self._seen[id(value)]
        self._seen[id(value)] = len(self._seen)
        members, own = members_of(value), own_attributes(value)
        if members and isinstance(value, (set, frozenset)):
            self.ordered = False
        keys = map(self._key, keys_of(value)) if isinstance(value, dict) else ()
        return kind, (*keys, *own), self.of_all([*members, *own.values()], depth + 1)

    def _key(self, key: Any) -> Any:
        kind = type(key)
        if kind is tuple:
            return tuple(map(self._key, key))
        if kind not in TOLD and kind not in _NUMBERS and not isinstance(key, Enum):
            self.ordered = False  # it is not compared: objects may be equal, and others than before
        return kind, key
