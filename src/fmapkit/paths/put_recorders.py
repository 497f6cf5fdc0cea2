"""Recorders of what code puts into modules while a pass runs.

Torch's own code decides by it, and does not record: so it is looked at where it is put.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from fmapkit.paths.recorders import NOTHING, value
from fmapkit.paths.rewriting import OF_TORCHS

_T = TypeVar("_T")


def put(append: Callable[[Any], None], given: _T, to: Any) -> _T:
    """A value becomes an attribute of a name that torch's own modules decide by."""
    return value(append, given) if issubclass(type(to), nn.Module) else given


class _Owner:
    """A module that gets attributes, by targets that are given parts of a value, or several."""

    __slots__ = ("_append", "_to")
    _append: Callable[[Any], None]
    _to: Any

    def __init__(self, append: Callable[[Any], None], to: Any) -> None:
        _set(self, "_append", append)
        _set(self, "_to", to)

    def __setattr__(self, name: str, given: Any) -> None:
        if name in OF_TORCHS:
            value(self._append, given)
        setattr(self._to, name, given)


_set = object.__setattr__


def owner(append: Callable[[Any], None], to: Any) -> Any:
    """Something gets an attribute as such a target."""
    if append is NOTHING or not issubclass(type(to), nn.Module):
        return to
    return _Owner(append, to)
