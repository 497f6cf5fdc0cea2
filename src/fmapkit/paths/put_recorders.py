"""Recorders of what code puts into modules while a pass runs: settings, classes and children.

Torch's own code goes by these, and does not record: so they are looked at where they are put.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from fmapkit.paths.elements import contents_of
from fmapkit.paths.items import item_of_builtin, other_callable
from fmapkit.paths.recorders import NOTHING, called, exact, value
from fmapkit.paths.rewriting import DECIDING

_T = TypeVar("_T")
_BUILTIN = types.BuiltinFunctionType
_DECIDE = nn.Module, type  # of these, attributes of some names decide
_ROWS = frozenset((list, tuple))


def put(append: Callable[[Any], None], given: _T, to: Any) -> _T:
    """A value becomes an attribute of a name that torch's own modules decide by."""
    return value(append, given) if issubclass(type(to), _DECIDE) else given


def child(append: Callable[[Any], None], given: _T) -> _T:
    """A value becomes an attribute or an element of what may be a module."""
    if issubclass(type(given), nn.Module) and append is not NOTHING:
        append(other_callable(given))
    return given


def children(append: Callable[[Any], None], given: _T) -> _T:
    """What a value holds is added to what may be a row of modules."""
    kind: type = type(given)
    rows: Any = ()
    if kind in _ROWS:
        rows = given
    elif issubclass(kind, nn.Module) and append is not NOTHING:
        rows = given._modules.values()  # type: ignore[attr-defined]
    for each in rows:
        child(append, each)
    return given


def _look(append: Callable[[Any], None], name: Any, given: Any) -> None:
    if type(name) is str and name in DECIDING:
        value(append, given)
    else:
        child(append, given)


class _Owner:
    """What gets attributes by targets that are given parts of a value, or several."""

    __slots__ = ("_append", "_to")
    _append: Callable[[Any], None]
    _to: Any

    def __init__(self, append: Callable[[Any], None], to: Any) -> None:
        _set(self, "_append", append)
        _set(self, "_to", to)

    def __setattr__(self, name: str, given: Any) -> None:
        _look(self._append, name, given)
        setattr(self._to, name, given)


_set = object.__setattr__


def owner(append: Callable[[Any], None], to: Any) -> Any:
    """Something gets an attribute as such a target."""
    if append is NOTHING or not issubclass(type(to), _DECIDE):
        return to
    return _Owner(append, to)


class _Parent:
    """What gets elements that are modules, or attributes by a dict of them."""

    __slots__ = ("_append", "_to")

    def __init__(self, append: Callable[[Any], None], to: Any) -> None:
        self._append = append
        self._to = to

    def __setitem__(self, at: Any, given: Any) -> None:
        exact(self._append, at)
        _look(self._append, at, given)
        self._to[at] = given


def parent(append: Callable[[Any], None], to: Any) -> Any:
    """Something gets an element, which may be a module."""
    return _Parent(append, to) if append is not NOTHING and _has_modules(to) else to


def _has_modules(given: Any) -> bool:
    """Whether something is a module, or may be a dict of children, or of a module's attributes."""
    kind = type(given)
    if not issubclass(kind, dict):
        return issubclass(kind, nn.Module)
    if not given or dict.__contains__(given, "_modules"):
        return True
    return issubclass(type(next(iter(dict.values(given)))), nn.Module)


def filled(append: Callable[[Any], None], function: Any) -> Any:
    """A method that puts elements into something is about to be called, as `append` does."""
    if append is NOTHING:
        return function
    kind = type(function)
    if kind is _BUILTIN:
        append(item_of_builtin(function))
        if function.__name__ != "update" or not _has_modules(function.__self__):
            return function
    else:
        there = called(append, function)
        if kind is not types.MethodType or not issubclass(type(function.__self__), nn.Module):
            return there

    def looked_at(*given: Any, **named: Any) -> Any:
        return function(*[_elements(append, each) for each in given], **named)

    return looked_at


def _elements(append: Callable[[Any], None], given: Any) -> Any:
    """What a module is given to hold; a generator tells of what it gives as it gives that."""
    kind = type(given)
    if kind is types.GeneratorType:
        return (child(append, each) for each in given)
    contents = contents_of(kind)
    if contents is None or issubclass(kind, nn.Module):
        return value(append, given)
    for each in contents(given):
        named = each if type(each) is tuple and len(each) == 2 else (None, each)
        _look(append, *named)
    return given
