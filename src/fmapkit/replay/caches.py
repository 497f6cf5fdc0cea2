"""Caches that a call fills: the next one finds them filled, and goes another way.

`if n not in self.masks: self.masks[n] = …` runs once, and so does a function behind `lru_cache`, or
what sets a global that is not there yet. How much is there is looked at as a call that is traced
begins, and once more as it ends. After a call that has filled something, the next is traced, too.
"""

from __future__ import annotations

import functools
from collections import OrderedDict, defaultdict, deque
from collections.abc import Hashable, Iterable, Mapping, Sequence
from logging import Logger
from types import (
    BuiltinFunctionType,
    CellType,
    FunctionType,
    MappingProxyType,
    MethodDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any

import torch
from torch import Tensor, nn

from fmapkit.replay.escapes import (
    closed_over,
    contents,
    globals_of,
    members_of,
    own_attributes,
    own_names,
)
from fmapkit.torchlib.nested import modules_in

# By place: what it is in (the attributes of an object, globals, a cell), and how much is there: the
# size of a container with those of what is in it, a tensor's shape.
Fill = dict[tuple[int, Hashable], tuple[Any, Any]]

_CONTAINERS = frozenset({dict, list, set, deque, OrderedDict, defaultdict})
_LISTS = frozenset({list, deque})
_CACHED: Any = functools._lru_cache_wrapper
# Nothing is filled in these. Plain attributes of modules are compared before each pass.
_NEVER = frozenset(
    {
        *(int, float, bool, str, bytes, tuple, frozenset, type, property, classmethod),
        *(staticmethod, FunctionType, BuiltinFunctionType, MethodType, ModuleType, Logger),
        *(MethodDescriptorType, MappingProxyType, nn.Parameter, torch.dtype, torch.device, object),
    }
)
_LIBRARIES = frozenset({"builtins", "functools", "torch", "typing", "numpy"})
_DEEPEST = 3
_MOST = 64  # members of one container that are looked at


def fill_of(region: nn.Module, functions: Sequence[FunctionType]) -> Fill:
    """How much is in what the code of a region may read; none of that code runs.

    That is in attributes of its modules and of their classes; and in what functions that run in it
    read by a global name, and in their closures and attributes.
    """
    found: Fill = {}
    bases: dict[type, None] = {}
    shared: set[int] = set()  # as a configuration is
    for module in modules_in(region):
        kind = type(module)
        if kind.__module__.startswith("torch."):
            continue
        bases.update(dict.fromkeys(kind.__mro__))
        own = module.__dict__
        found[id(own), _SIZE] = own, len(own)
        for space, names in ((own, own_names(tuple(own))), (module._buffers, module._buffers)):
            for name in names:
                value = space[name]
                if type(value) not in _NEVER and value is not None and id(value) not in shared:
                    shared.add(id(value))
                    _add(found, space, name, value)
    for base in bases:
        if base is not object and not base.__module__.startswith("torch."):
            _add_all(found, vars(base), tuple(vars(base)))
    for space, read in globals_of(functions):
        _add_all(found, space, read)
    for function in functions:
        for name, value in function.__dict__.items():
            _add(found, function.__dict__, name, value)
        for cell, value in zip(function.__closure__ or (), closed_over(function), strict=True):
            _add(found, cell, _SIZE, value)
    return found


def has_more(before: Fill) -> bool:
    """Whether something of what was there is there no more as it was."""
    return any(_now(space, name) != fill for (_, name), (space, fill) in before.items())


def _now(space: Any, name: Hashable) -> Any:
    if type(space) is CellType:
        return _fill(contents(space), 0)
    return len(space) if name is _SIZE else _fill(space.get(name, _NOTHING), 0)


def _add_all(found: Fill, space: Mapping[str, Any], names: Iterable[str]) -> None:
    """What a class or a file calls by some names, as far as it is there."""
    for name in names:
        value = space.get(name, _NOTHING)
        if type(value) is bool or type(value) not in _NEVER:
            _add(found, space, name, value)


def _add(found: Fill, space: Any, name: Hashable, value: Any) -> None:
    fill = _fill(value, 0)
    if fill is not _NOTHING:
        found[id(space), name] = space, fill


_NOTHING, _SIZE = object(), object()


def _fill(value: Any, depth: int) -> Any:
    kind = type(value)
    if kind is bool or value is None:
        return value
    if kind in _NEVER:
        return _NOTHING
    if kind in _CONTAINERS:
        members = members_of(value)
        fills = [_fill(m, depth + 1) for m in members[:_MOST]] if depth < _DEEPEST else []
        # A list that numbers are appended to is a log.
        size = 0 if kind in _LISTS else len(members)
        return size, [fill for fill in fills if fill is not _NOTHING]
    if kind is Tensor:
        return value.shape
    if kind is _CACHED:
        return value.cache_info().currsize
    if depth or kind.__module__ in _LIBRARIES or issubclass(kind, (nn.Module, Tensor, type)):
        return _NOTHING
    own = own_attributes(value)  # those of another object
    return [len(own), *[_fill(inner, depth + 1) for inner in own.values()]]
