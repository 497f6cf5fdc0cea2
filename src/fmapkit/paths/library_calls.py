"""Functions of Python's own library that go by plain values in what they are given.

Their code leaves no mark: what they go through is looked at before, and so is what they are given
back by a function that they call.
"""

from __future__ import annotations

import ast
import bisect
import builtins
import functools
import heapq
import itertools
import types
from typing import Any

__all__ = ["calls_back", "goes_through", "object_named"]

# Homes of functions that go through all that they are given.
_HOMES = {"collections", "heapq", "itertools"}
# The same of builtins, and of methods of containers.
_BUILTINS = {"dict", "enumerate", "filter", "map", "sorted", "zip"}
_METHODS = {"from_iterable", "fromkeys", "update"}
# By function: where it is given one that it calls, and by what name.
_CALLED: dict[Any, tuple[int | None, str | None]] = {
    filter: (0, None),
    map: (0, None),
    max: (None, "key"),
    min: (None, "key"),
    sorted: (None, "key"),
    bisect.bisect_left: (None, "key"),
    bisect.bisect_right: (None, "key"),
    bisect.insort_left: (None, "key"),
    bisect.insort_right: (None, "key"),
    functools.cmp_to_key: (0, "mycmp"),
    heapq.merge: (None, "key"),
    heapq.nlargest: (2, "key"),
    heapq.nsmallest: (2, "key"),
    itertools.accumulate: (1, "func"),
    itertools.dropwhile: (0, None),
    itertools.filterfalse: (0, None),
    itertools.groupby: (1, "key"),
    itertools.starmap: (0, None),
    itertools.takewhile: (0, None),
}
_KINDS = (type, types.FunctionType, types.BuiltinFunctionType)


def object_named(function: ast.expr, names: dict[str, Any], local: frozenset[str]) -> Any:
    """The function or class of a library's that an expression stands for; None if it is none.

    Args:
        function: the expression.
        names: globals of the code it is in.
        local: names that are bound in that code.
    """
    path: list[str] = []
    while isinstance(function, ast.Attribute):
        path.append(function.attr)
        function = function.value
    if not isinstance(function, ast.Name) or function.id in local:
        return None
    found = names.get(function.id, vars(builtins).get(function.id))
    for name in reversed(path):
        if type(found) is not types.ModuleType:
            return None
        found = vars(found).get(name)
    return found if type(found) in _KINDS else None


def goes_through(function: ast.expr, found: Any) -> bool:
    """Whether a call goes through what it is given, and may pick by that.

    Args:
        function: what stands where the call goes to.
        found: what that is (see `object_named`).
    """
    if found is None:
        return isinstance(function, ast.Attribute) and function.attr in _METHODS
    home = found.__module__
    if home == "builtins":
        return found.__name__ in _BUILTINS
    return isinstance(home, str) and home.lstrip("_") in _HOMES


def calls_back(node: ast.Call, found: Any) -> tuple[int | None, str | None]:
    """Where a call is given a function that code in C calls: the position, and the keyword."""
    if isinstance(node.func, ast.Attribute) and node.func.attr == "sort":
        return None, "key"
    return _CALLED.get(found, (None, None)) if found is not None else (None, None)
