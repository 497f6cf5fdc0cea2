"""Recorders of indices: by which something is read, put in its place, or deleted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from fmapkit.paths.elements import forms, picks_by_index
from fmapkit.paths.items import FORMS, PLAIN
from fmapkit.paths.recorders import NOTHING, elements, exact, place, value

_T = TypeVar("_T")


def at(append: Callable[[Any], None], given: _T) -> _T:
    """A value becomes an index of a tensor: by a tensor, it may make a view or a copy."""
    kind = type(given)
    if kind in PLAIN:
        append(given)
    elif append is not NOTHING:
        if kind not in FORMS:
            value(append, given)
        forms(append, given)
    return given


def index(append: Callable[[Any], None], of: Any, given: _T) -> _T:
    """A value becomes an index of something."""
    kind = type(of)
    if kind is Tensor or not picks_by_index(kind):
        return at(append, given)
    if kind is np.ndarray and not of.dtype.hasobject:
        return at(append, given)
    return elements(append, given) if type(given) is np.ndarray else exact(append, given)


class _Indexed:
    """A container, of which one element is asked for, or put in: by which index is looked at."""

    __slots__ = ("_append", "_of")

    def __init__(self, append: Callable[[Any], None], of: Any) -> None:
        self._append = append
        self._of = of

    def __getitem__(self, at: Any) -> Any:
        return self._of[place(self._append, at)]

    def __setitem__(self, at: Any, given: Any) -> None:
        self._of[place(self._append, at)] = given

    def __delitem__(self, at: Any) -> None:
        del self._of[place(self._append, at)]


def indexed(append: Callable[[Any], None], of: Any) -> Any:
    """A value has an index; the index is looked at by `value`, too."""
    kind = type(of)
    if kind is Tensor or append is NOTHING or not picks_by_index(kind) or kind is np.ndarray:
        return of
    return _Indexed(append, of)
