"""Tensors in nested arguments and outputs, and modules in modules."""

from __future__ import annotations

import copy
import types
import weakref
from collections import UserDict, UserList, deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

# What most arguments are: `isinstance(value, Tensor)` asks a metaclass of all that is not a Tensor.
_TENSORS = frozenset({Tensor, nn.Parameter})
_OTHERS = frozenset(
    {type(None), bool, int, float, str, slice, torch.Size, torch.dtype, torch.device}
)
_PLAIN = (tuple, list, dict)
_CONSTANT = (
    *(type(None), bool, int, float, complex, str, bytes, slice, range, Enum),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
# Have tensors that are not theirs, or none.
_NOT_ENTERED = (
    *(nn.Module, type, types.ModuleType, types.FunctionType, types.MethodType),
    *(types.BuiltinFunctionType, weakref.ProxyType, weakref.CallableProxyType),
)


def tensors_in(*values: Any) -> list[Tensor]:
    """Every tensor in nested tuples, lists and dicts, in order."""
    found: list[Tensor] = []
    for value in values:
        kind = type(value)
        if kind in _TENSORS:
            found.append(value)
        elif kind in _OTHERS:
            continue
        elif isinstance(value, (tuple, list, dict)):
            parts = contents(value)
            if not _OTHERS.issuperset(map(type, parts)):
                found += tensors_in(*parts)
        elif isinstance(value, Tensor):
            found.append(value)
    return found


def contents(value: Any) -> Sequence[Any]:
    """What is in a tuple or a list, or the values of a dict, past what a subclass may do."""
    found: Sequence[Any] = value
    if type(value) in (tuple, list):
        return found
    if isinstance(value, dict):
        return [*dict.values(value)]
    return [*(list if isinstance(value, list) else tuple).__iter__(value)]


def modules_in(module: nn.Module) -> list[nn.Module]:
    """What `module.modules()` gives: itself and all in it, each once, outermost first.

    That is a generator for each level, each of which hands on what those below it give.
    """
    found: dict[nn.Module, None] = {}
    _collect(module, found)
    return list(found)


def _collect(module: nn.Module, found: dict[nn.Module, None]) -> None:
    found[module] = None
    for child in module._modules.values():
        if child is not None and child not in found:
            if child._modules:
                _collect(child, found)
            else:
                found[child] = None


def leaves(value: Any, path: str = "") -> list[tuple[str, Tensor]]:
    """Each tensor of a nested output with its path: `[0]`, `['w']`, `.logits`, `[1].box.corners`.

    Objects of any class are looked into, by the attributes that they have themselves: nothing of
    theirs is called. What an attribute repeats of the same object is not told twice.
    """
    if isinstance(value, Tensor):
        return [(path, value)]
    return [(p, v) for p, v in _ends(value, path, {}) if isinstance(v, Tensor)]


def closed_parts(value: Any) -> list[tuple[str, str]]:
    """The parts of an output that may have tensors and cannot be looked into: path and type.

    Generators and other iterators would be used up, the members of a set have no places. Of what
    has no tensor at all it is every part but plain constants.
    """
    ends = list(_ends(value, "", {}))
    kinds: Any = (Iterator, set, frozenset)
    if not any(isinstance(v, Tensor) for _, v in ends):
        kinds = object
    return [
        (path, type(part).__name__)
        for path, part in ends
        if isinstance(part, kinds) and not isinstance(part, (*_CONSTANT, *_PLAIN, deque, Tensor))
    ]


def _ends(value: Any, path: str, entered: dict[int, Any]) -> Iterator[tuple[str, Any]]:
    """Whatever has no parts of its own; `entered` has, by id, what is or was looked into."""
    if isinstance(value, Tensor) or id(value) in entered:
        if isinstance(value, Tensor):
            yield path, value
        return
    found = list(parts(value, path))
    own = list(attributes(value, path)) if type(value) not in _PLAIN else []
    if not found and not own:
        yield path, value
        return
    entered[id(value)] = value
    told: set[int] = set()
    for _, place, part in found:
        for end in _ends(part, place, entered):
            told.add(id(end[1]))
            yield end
    for _, place, part in own:
        for end in _ends(part, place, entered):
            if id(end[1]) not in told or not isinstance(end[1], Tensor):
                told.add(id(end[1]))
                yield end
    if not own:  # two places of a tuple may have the same list
        del entered[id(value)]


class Attribute(str):
    """The name of an attribute, where the keys of a container are told beside it."""

    __slots__ = ()


def parts(value: Any, path: str) -> Iterator[tuple[Any, str, Any]]:
    """What a container has in its places: the key, the place, the part."""
    if isinstance(value, (UserDict, UserList)):
        value = value.data
    fields = getattr(type(value), "__dataclass_fields__", None)
    if fields is not None:
        for name in fields:
            yield Attribute(name), f"{path}.{name}", getattr(value, name, None)
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        for name in value._fields:
            yield Attribute(name), f"{path}.{name}", getattr(value, name)
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(contents(value)):
            yield index, f"{path}[{index}]", item
    elif isinstance(value, deque):
        for index, item in enumerate(deque.__iter__(value)):
            yield index, f"{path}[{index}]", item
    elif isinstance(value, (dict, types.MappingProxyType)):
        for key, item in dict.items(value) if isinstance(value, dict) else value.items():
            yield key, f"{path}[{key!r}]", item


def attributes(value: Any, path: str) -> Iterator[tuple[Attribute, str, Any]]:
    """The attributes that an object has itself, public ones first, but for fields and contents."""
    if isinstance(value, _NOT_ENTERED):
        return
    kind = type(value)
    found: dict[str, Any] = {}
    for base in kind.__mro__:
        slots = base.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            mangled = name.startswith("__") and not name.endswith("__")
            name = f"_{base.__name__.lstrip('_')}{name}" if mangled else name
            with suppress(AttributeError):  # a slot that was never filled
                found[name] = object.__getattribute__(value, name)
    with suppress(AttributeError):  # it has slots alone, or nothing
        found.update(object.__getattribute__(value, "__dict__"))
    for name in getattr(kind, "__dataclass_fields__", ()):
        found.pop(name, None)
    if isinstance(value, (UserDict, UserList)):
        found.pop("data", None)
    for name in sorted(found, key=lambda name: name.startswith("_")):
        yield Attribute(name), f"{path}.{name}", found[name]


def rebuilt(value: Any, path: str, tensor: Tensor) -> Any:
    """A nested value with another tensor at a path of it; the given value stays as it is.

    Each container on the way is copied, all else is shared, as in what a forward hook would return
    that was written by hand.

    Args:
        value: nested tuples, lists, dicts, dataclasses, or objects with attributes.
        path: one that `leaves` tells of it; empty where the value is a tensor itself.

    Raises:
        KeyError: the value has no such path.
    """
    return _rebuilt(value, "", path, tensor)


def _rebuilt(value: Any, here: str, path: str, tensor: Tensor) -> Any:
    if here == path:
        return tensor
    for key, place, part in (*parts(value, here), *attributes(value, here)):
        if place == path or (path.startswith(place) and path[len(place)] in "[."):
            return _with(value, key, _rebuilt(part, place, path, tensor))
    raise KeyError(path)


def _with(value: Any, key: Any, part: Any) -> Any:
    """A copy of a container with another part."""
    if isinstance(value, tuple):
        named: Any = getattr(value, "_replace", None)
        if isinstance(key, Attribute) and named is not None:
            return named(**{str(key): part})
        items = [part if i == key else item for i, item in enumerate(value)]
        kind: Any = type(value)  # torch's own named ones (`torch.return_types`) take a list, too
        return kind(items)
    if isinstance(value, types.MappingProxyType):
        return types.MappingProxyType({**value, key: part})
    made = copy.copy(value)
    if isinstance(key, Attribute):
        try:
            setattr(made, key, part)
        except AttributeError:  # of a frozen dataclass
            object.__setattr__(made, key, part)
    else:
        made[key] = part
    return made
