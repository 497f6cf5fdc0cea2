"""What is asked of φ: which maps, and in which form they are returned.

| given | φ returns |
| --- | --- |
| a name or a module | a tensor |
| a list or tuple of these | a tuple of tensors, in that order |
| a dict of key -> one of these | a dict of tensors, by these keys |
| a glob, regex, type or callable, or a list with one of them | a dict of tensors, by layer |

In the place of a layer, a list or dict may have a pair (layer, kind).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fmapkit.errors import ArgumentError, check_kind, is_int
from fmapkit.kinds import Kind
from fmapkit.selection import given_filters
from fmapkit.selectors import Selector


@dataclass(frozen=True, slots=True)
class Item:
    """One map that is asked for, or of a selector that may match several, all of these.

    Attributes:
        key: under which it is returned; None where the layer's name is the key.
        kind: of the map; None for the activation, or the output of a module that is no layer.
        exact: it is one map.
    """

    key: str | None
    layer: Any
    kind: Kind | None
    exact: bool


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of one φ.

    Attributes:
        items: the maps.
        form: of what is returned: "one", "tuple" or "dict".
        filters: to pick from each map; None for all, a dict by layer for some.
        call: of the layer; None where it has one alone.
        path: in a nested output; None where there is one alone.
    """

    items: tuple[Item, ...]
    form: Literal["one", "tuple", "dict"]
    filters: tuple[int, ...] | Mapping[str, tuple[int, ...]] | None
    call: int | None
    path: str | None

    @classmethod
    def of(cls, layers: Any, kind: Any, filters: Any, call: Any, path: Any) -> Request:
        """What was given, if all of it is of an allowed form."""
        kind = None if kind is None else check_kind(kind)
        items, form = _items(layers, kind)
        if call is not None and (not is_int(call) or call < 0):
            raise ArgumentError(f"call must be a call's number, from 0, or None, not {call!r}")
        if path is not None and not isinstance(path, str):
            raise ArgumentError(f"path must be a place such as '[0]' or '.logits', not {path!r}")
        return cls(items, form, given_filters(filters), call, path)

    @property
    def layers(self) -> list[Any]:
        return [item.layer for item in self.items]

    @property
    def kinds(self) -> tuple[Kind, ...]:
        return tuple(dict.fromkeys(item.kind or "activation" for item in self.items))

    def filters_of(self, layer: str) -> tuple[int, ...] | None:
        """The filters to pick from a layer's map; None for all of them."""
        if isinstance(self.filters, Mapping):
            return self.filters.get(layer)
        return self.filters

    def __str__(self) -> str:
        return ", ".join(repr(Selector(i.layer)) if i.exact else repr(i.layer) for i in self.items)


def _items(layers: Any, kind: Kind | None) -> tuple[tuple[Item, ...], Any]:
    if isinstance(layers, Mapping):
        if not layers:
            raise ArgumentError("layers={} asks for no map")
        wrong = [key for key in layers if not isinstance(key, str)]
        if wrong:
            raise ArgumentError(f"a dict of layers has a name for each, not {wrong[0]!r}")
        items = tuple(_item(key, given, kind) for key, given in layers.items())
        several = [i.key for i in items if not i.exact]
        if several:
            raise ArgumentError(
                f"layers[{several[0]!r}] may match several layers, and a dict has one for each key"
            )
        return items, "dict"
    if isinstance(layers, (list, tuple)):
        if not layers:
            raise ArgumentError("layers=[] asks for no map")
        items = tuple(_item(None, given, kind) for given in layers)
        return items, "tuple" if all(i.exact for i in items) else "dict"
    item = _item(None, layers, kind)
    return (item,), "one" if item.exact else "dict"


def _item(key: str | None, given: Any, kind: Kind | None) -> Item:
    if isinstance(given, tuple):
        if len(given) != 2:
            raise ArgumentError(f"in a list or dict, a layer is one, or (layer, kind), not {given}")
        given, kind = given[0], check_kind(given[1])
    if given is None:
        raise ArgumentError(
            "a layer is given by a name, glob, regex, module, module type or callable, not None"
        )
    return Item(key, given, kind, Selector(given).exact)
