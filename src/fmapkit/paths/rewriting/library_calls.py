"""Functions of Python's own library that go by plain values in what they are given.

Their code leaves no mark: what they go through is looked at before, and so is what they are given
back by a function that they call.
"""

from __future__ import annotations

import ast
import bisect
import builtins
import collections
import functools
import heapq
import itertools
import types
from typing import Any

from fmapkit.paths.rewriting.syntax import dotted, in_modules

# Builtins whose arguments need no look: what they return is looked at where it is used.
HARMLESS = {
    *("abs", "all", "any", "bool", "callable", "float", "hasattr", "id", "int", "isinstance"),
    *("issubclass", "iter", "len", "list", "print", "repr", "reversed", "round", "set", "str"),
    *("sum", "super", "tuple", "type"),
}
# Those that use all elements of what they are given.
TAKE_ALL = {"all", "any", "frozenset", "list", "set", "sum", "tuple"}
# Those that pick one of what they are given; a number that they pick is looked at where it is used.
PICK = {"max", "min"}

# Homes of functions that go through all that they are given.
_HOMES = {"collections", "heapq", "itertools", "operator"}
# The same of builtins, and of methods of containers.
_BUILTINS = {"enumerate", "filter", "zip"}
_METHODS = {"from_iterable", "fromkeys"}
# Those that go by the keys of a mapping, and hand on its values.
_BY_KEYS = {"Counter", "OrderedDict", "defaultdict", "dict", "update"}
# Those that put all elements where they are looked at later, or into a number or a text.
_TAKE_ALL = {"extend", "extendleft", "join", "writelines"}
_MAKE_NUMBERS = {"math", "numpy", "statistics", "torch"}
# A position, a name, and the recorder of what the function that is given so gives back.
_Given = tuple[int | None, str | None, str]
# By function: where it is given one that it calls.
_CALLED: dict[Any, _Given] = {
    filter: (0, None, "keyed"),
    map: (0, None, "mapped"),
    max: (None, "key", "ranking"),
    min: (None, "key", "ranking"),
    sorted: (None, "key", "ranking"),
    bisect.bisect_left: (None, "key", "keyed"),
    bisect.bisect_right: (None, "key", "keyed"),
    bisect.insort_left: (None, "key", "keyed"),
    bisect.insort_right: (None, "key", "keyed"),
    functools.cmp_to_key: (0, "mycmp", "keyed"),
    heapq.merge: (None, "key", "ranking"),
    heapq.nlargest: (2, "key", "ranking"),
    heapq.nsmallest: (2, "key", "ranking"),
    itertools.accumulate: (1, "func", "keyed"),
    itertools.dropwhile: (0, None, "keyed"),
    itertools.filterfalse: (0, None, "keyed"),
    itertools.groupby: (1, "key", "keyed"),
    itertools.starmap: (0, None, "keyed"),
    itertools.takewhile: (0, None, "keyed"),
}
# Of these a loop gets all elements, in order, or positions: its turns are marked, and the elements
# are looked at where they are used.
GIVE_ALL = {
    *(enumerate, range, reversed, zip, itertools.chain, itertools.combinations),
    *(itertools.permutations, itertools.product, itertools.zip_longest),
    itertools.pairwise,
}
_NONE: _Given = (None, None, "keyed")
_KINDS = (type, types.FunctionType, types.BuiltinFunctionType)


def object_named(function: ast.expr, names: dict[str, Any], local: frozenset[str]) -> Any:
    """The function or class of a library's that an expression stands for; None if it is none."""
    path = dotted(function, local)
    if path is None:
        return None
    found = in_modules(names.get(path[0], vars(builtins).get(path[0])), path[1:])
    return found if type(found) in _KINDS else None


def goes_through(node: ast.Call, found: Any) -> str | None:
    """The recorder of what a call of `found` goes through, and may pick by; None if it does not."""
    function = node.func
    if found is map:  # it hands on all; a lambda tells of each turn itself
        return None if node.args and isinstance(node.args[0], ast.Lambda) else "unpacked"
    if found is None:
        name = function.attr if isinstance(function, ast.Attribute) else ""
        return "keys" if name in _BY_KEYS else "elements" if name in _METHODS else None
    home, name = found.__module__, found.__name__
    if not isinstance(home, str) or name == "deque":
        return None
    home = home.lstrip("_")
    if found is sorted:
        return "ordered"
    if name in _BY_KEYS and home in ("builtins", "collections"):
        return "keys"
    return "elements" if home in _HOMES or (home == "builtins" and name in _BUILTINS) else None


def takes_all(function: ast.expr, found: Any) -> bool:
    """Whether a call takes all elements of what it is given, and picks none."""
    if found is None:
        return isinstance(function, ast.Attribute) and function.attr in _TAKE_ALL
    home = found.__module__
    of = home.lstrip("_").partition(".")[0] if isinstance(home, str) else ""
    return of in _MAKE_NUMBERS or found is collections.deque


def calls_back(node: ast.Call, found: Any) -> _Given:
    """Where a call is given a function that code in C calls."""
    if isinstance(node.func, ast.Attribute) and node.func.attr == "sort":
        return None, "key", "ranking"
    if found is iter and len(node.args) > 1:
        return 0, None, "keyed"
    return _CALLED.get(found, _NONE) if found is not None else _NONE
