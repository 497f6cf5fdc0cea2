"""Tensors of a pass that outlive it in the model's own state, and may be read back in a later one.

Whether `self.queue[0]` is a tensor of this pass or of an earlier one, no decision tells. So a
module whose code keeps tensors of the pass under a name that is read, too, is traced in every pass.
"""

from __future__ import annotations

import logging
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from fmapkit.torchlib.caching import remembered
from fmapkit.torchlib.nested import modules_in

COMMON = frozenset({*nn.Module().__dict__, "_compiled_call_impl"})  # ours may stand in the last
_CODE = (types.FunctionType, types.BuiltinFunctionType, types.ModuleType, types.MethodType)
_NO_HOLDERS = (
    *(int, float, complex, str, bytes, type(None), type, nn.Module),
    *_CODE,
    logging.Logger,  # by one, all of them are reached
)
_PLAIN = frozenset({int, float, bool, str, bytes, type(None)})
# Most values are of one of these: to ask that is less than `isinstance`.
_NONE_IN = _PLAIN | {type, torch.dtype, torch.device, *_CODE}
_NO_ATTRIBUTES = frozenset({list, tuple, dict, set, frozenset, deque})
_LISTED: tuple[Any, ...] = (list, tuple, deque, set, frozenset)
_DEEPEST = 8
_MOST = 2_000  # objects that are looked at in one place


class EscapedTensors:
    """Looks for tensors of a pass in what outlives it, while nothing else runs."""

    def __init__(self, is_of_pass: Callable[[Tensor], bool], read: frozenset[str]) -> None:
        self._is_of_pass = is_of_pass  # whether a tensor was made in the pass, from its input
        self._read = read  # the names that code which ran reads
        self._without: set[int] = set()  # values that hold none, by their ids: a configuration

    def attributes(self, region: nn.Module) -> list[tuple[nn.Module, str]]:
        """Where modules in a region keep such tensors, and their code may read them back."""
        found: list[tuple[nn.Module, str]] = []
        known: dict[tuple[str, ...], list[str]] = {}  # modules of a class have the same names
        for module in modules_in(region):
            own = module.__dict__
            names = known.get(there := tuple(own))
            if names is None:
                names = known[there] = [n for n in own_names(there) if n in self._read]
            for name in names:
                if type(own[name]) not in _NONE_IN and self.holds(own[name]):
                    found.append((module, name))
        return found

    def arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[int | str]:
        """The places and names of what a module is given that keeps such tensors."""
        given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        return [p for p, v in given if not isinstance(v, Tensor) and self.holds(v)]

    def functions(self, functions: Iterable[types.FunctionType]) -> bool:
        """Whether functions keep such tensors: in closures, defaults, or globals that they read."""
        seen = tuple(functions)
        values = [space.get(name) for space, names in globals_of(seen) for name in names]
        for function in seen:
            values += (*closed_over(function), *(function.__defaults__ or ()))
        return any(self.holds(v) for v in values if type(v) not in _NONE_IN)

    def holds(self, value: Any) -> bool:
        """Whether a value is, or holds, a tensor of the pass."""
        if type(value) is tuple and _PLAIN.issuperset(map(type, value)):
            return False
        if id(value) in self._without:
            return False
        if isinstance(value, Tensor):
            found = self._is_of_pass(value)
        else:
            found = not isinstance(value, _NO_HOLDERS) and self._search(value)
        if not found:
            self._without.add(id(value))
        return found

    def _search(self, value: Any) -> bool:
        left = _MOST
        todo: deque[tuple[Any, int]] = deque([(value, 0)])
        seen: set[int] = set()
        while todo and left:
            left -= 1
            found, depth = todo.popleft()
            if isinstance(found, Tensor):
                if self._is_of_pass(found):
                    return True
            elif depth < _DEEPEST and id(found) not in seen:
                seen.add(id(found))
                inside = *members_of(found), *own_attributes(found).values()
                todo += [(i, depth + 1) for i in inside if type(i) not in _PLAIN]
        return False


@lru_cache(maxsize=4096)
def own_names(attributes: tuple[str, ...]) -> tuple[str, ...]:
    """Of the names of a module's attributes, those that not every module has."""
    return tuple([name for name in attributes if name not in COMMON])


def globals_of(
    functions: Iterable[types.FunctionType],
) -> list[tuple[dict[str, Any], set[str]]]:
    """The globals of functions, each once, with the names that their code mentions."""
    found: dict[int, tuple[dict[str, Any], set[str]]] = {}
    for function in functions:
        space = function.__globals__
        found.setdefault(id(space), (space, set()))[1].update(function.__code__.co_names)
    return list(found.values())


def closed_over(function: types.FunctionType) -> list[Any]:
    """What is in the closure of a function; None where nothing is bound to a name yet."""
    return list(map(contents, function.__closure__ or ()))


def contents(cell: types.CellType) -> Any:
    """What is in a cell of a closure; None if nothing is."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def members_of(value: Any) -> list[Any]:
    """What a container holds, but for its attributes; none of its own code runs."""
    kind = type(value)
    if issubclass(kind, dict):
        return [dict.__getitem__(value, key) for key in keys_of(value)]
    base = _listed(kind)
    return [] if base is None else list(base.__iter__(value))


@remembered
def _listed(kind: type) -> Any:
    """Which of the rows and sets a class is made of; None if it is none."""
    return next((base for base in _LISTED if issubclass(kind, base)), None)


def keys_of(value: dict[Any, Any]) -> list[Any]:
    """The keys of a dict in their order, which an `OrderedDict` has apart from the dict's own."""
    base = OrderedDict if isinstance(value, OrderedDict) else dict
    return list(base.__iter__(value))


def own_attributes(value: Any) -> dict[str, Any]:
    """The attributes of an object, slots among them; none of its own code runs."""
    slots = _slots_of(type(value))
    found: dict[str, Any] = {}
    if slots is None:
        return found
    for name, slot in slots:
        with suppress(AttributeError):  # it was never filled
            found[name] = slot.__get__(value)
    try:
        own = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return found
    return {**found, **own} if isinstance(own, dict) else found


@remembered
def _slots_of(kind: type) -> list[tuple[str, Any]] | None:
    """The slots of a class's objects; None where these have no attributes that are looked at."""
    if kind in _NO_ATTRIBUTES or issubclass(kind, _NO_HOLDERS):
        return None
    return [
        (name, slot)
        for base in kind.__mro__
        if "__slots__" in base.__dict__
        for name, slot in base.__dict__.items()
        if type(slot) is types.MemberDescriptorType
    ]
