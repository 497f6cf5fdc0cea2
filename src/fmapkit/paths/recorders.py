"""What a twin calls at each decision (see `rewrite.py`).

Recorders run in whatever thread runs a twin. They write only where that thread records.
"""

from __future__ import annotations

import math
import operator
import sys
import types
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from fmapkit.paths import compiled_calls
from fmapkit.paths.elements import WRAPPERS, contents_of, item_of_elements, keys_of, taking
from fmapkit.paths.items import (
    CALLABLES,
    FALSE,
    IN_TORCH,
    ITEM_OF,
    NUMBERS,
    PLAIN,
    TRUE,
    Fixed,
    class_of,
    function_at,
    ignore,
    item_of_builtin,
    item_of_class,
    other_callable,
    tensor_item,
)
from fmapkit.paths.rewriting import FLOATS_ARE_IDLE, MARK, ONLY_ZERO_DECIDES
from fmapkit.paths.sinks import append_of, ident, tell_unrecorded, when_unrecorded
from fmapkit.torchlib import apart
from fmapkit.torchlib.apart import FACES
from fmapkit.torchlib.compiled_modules import COMPILED, is_optimized_type
from fmapkit.torchlib.fused.paths import instead_of

_T = TypeVar("_T")

_FUNCTION = types.FunctionType
_BUILTIN = types.BuiltinFunctionType
twins: set[int] = set()  # the code that calls us, told by its identity: it is kept
_SETTINGS = frozenset({bool, str, type(None), torch.dtype, torch.device})
_ROWS = frozenset((list, tuple, str, bytes))
_FLOATS = frozenset((float, np.float64, np.float32, np.float16))
_BEGIN = frozenset((f"{MARK}enter", f"{MARK}current"))
NOTHING: Callable[[Any], None] = deque(maxlen=0).append
# Methods of containers that are given a place in them, or a key.
_BY_PLACE = frozenset(
    {
        *("__delitem__", "__getitem__", "__setitem__", "get", "insert", "move_to_end", "pop"),
        *("rotate", "setdefault"),
    }
)


class Manager:
    """What items of context managers begin with."""


def enter(site: str) -> Callable[[Any], None]:
    """A function begins; what its items are to be given to while it runs."""
    append: Callable[[Any], None] | None = append_of(ident())
    if append is None:
        if when_unrecorded:
            tell_unrecorded(sys._getframe(1))
        return NOTHING
    append(site)
    return append


def current() -> Callable[[Any], None]:
    """The same of code that has no variable for it."""
    append: Callable[[Any], None] = append_of(ident(), NOTHING)
    return append


def resumed(site: str, given: _T) -> _T:
    """A generator goes on after a `yield`: it may have been left there in an earlier pass."""
    append = append_of(ident())
    if append is not None:
        append(site)
    elif when_unrecorded:
        tell_unrecorded(sys._getframe(1))
    return given


def value(append: Callable[[Any], None], given: _T) -> _T:
    """A value becomes an argument, an index or an exponent."""
    kind = type(given)
    if kind is not Tensor:
        if kind in PLAIN:
            append(given)
        elif kind is bool:
            append(TRUE if given else FALSE)
        elif append is not NOTHING:
            item_of = ITEM_OF.get(kind) or item_of_class(kind)
            if item_of is not ignore:
                append(item_of(given))
    return given


def parameter(append: Callable[[Any], None], given: _T) -> _T:
    """An attribute of what is not compared becomes an operand: it may be a parameter."""
    kind = type(given)
    if kind is not Tensor and issubclass(kind, Tensor) and append is not NOTHING:
        append(tensor_item(given))
    return given


def exact(append: Callable[[Any], None], given: _T) -> _T:
    """A value becomes what Python itself picks by: no number of it may follow the sizes."""
    kind = type(given)
    if kind in PLAIN:
        append(given if kind is str else Fixed((given,)))
    elif kind is not Tensor and append is not NOTHING:
        _append_fixed(append, given, ITEM_OF.get(kind) or item_of_class(kind))
    return given


def _append_fixed(append: Callable[[Any], None], given: Any, item_of: Any) -> None:
    if item_of is not ignore:
        append(Fixed((item_of(given),)))


def place(append: Callable[[Any], None], at: _T) -> _T:
    """Where an element is, in code that has looked at it by `value` as well."""
    return at if type(at) is str else exact(append, at)


def handed(append: Callable[[Any], None], to: Any, name: str | None, given: _T) -> _T:
    """A value becomes an argument of what may record itself what it decides by that.

    So it is with floats that are annealed: they are another one in each pass, and decide nothing.

    Args:
        to: what is called, or what has that as an attribute; None for a function of torch's.
        name: of this, or of the attribute; None if `to` is called itself.
    """
    kind = type(given)
    if kind in PLAIN:
        append(given)
    elif kind is bool:
        append(TRUE if given else FALSE)
    elif kind is Tensor or append is NOTHING:
        pass
    elif kind not in _FLOATS:
        item_of = ITEM_OF.get(kind) or item_of_class(kind)
        if item_of is not ignore:
            append(item_of(given))
    else:
        if to is None or type(to) is Tensor:
            idle = name in FLOATS_ARE_IDLE or (name in ONLY_ZERO_DECIDES and given != 0)
        else:
            idle = _records(function_at(to, name))
        append(kind if idle else (ITEM_OF.get(kind) or item_of_class(kind))(given))
    return given


def entered(append: Callable[[Any], None], given: _T) -> _T:
    """A value becomes what a `with` statement enters: a mode, say.

    Of torch's own, the settings tell, and the code of a model's own records what it does.
    """
    if append is not NOTHING:
        kind = type(given)
        if not str(kind.__module__).startswith("torch."):
            append((Manager, class_of(kind)))
            return given
        own = object.__getattribute__(given, "__dict__")
        told = {n: v for n, v in own.items() if type(v) in _SETTINGS and not n.startswith("prev")}
        append((Manager, kind, *told.items()))
    return given


def _records(function: Any) -> bool:
    """Whether a function runs a twin that looks at what it decides by, or makes numbers alone."""
    if type(function) is _BUILTIN:
        return function.__self__ is math
    code = function.__code__ if type(function) is _FUNCTION else None
    return code is not None and id(code) in twins and not _BEGIN.isdisjoint(code.co_names)


def tells_of_calls(function: types.FunctionType) -> bool:
    """Whether a function runs a twin that tells of each of its calls as it begins."""
    return id(function.__code__) in twins and f"{MARK}enter" in function.__code__.co_names


def compared(append: Callable[[Any], None], name: str, left: Any, right: Any) -> Any:
    """Two values are compared; a number that a tensor is compared with says what the mask is of."""
    if type(left) is Tensor:
        value(append, right)
    elif type(right) is Tensor:
        value(append, left)
    return getattr(operator, name)(left, right)


def elements(append: Callable[[Any], None], given: _T) -> _T:
    """A value becomes what Python itself goes through, and may pick by."""
    kind = type(given)
    if kind in PLAIN:
        return exact(append, given)
    if kind is not Tensor and append is not NOTHING:
        _append_fixed(append, given, item_of_elements(kind))
    return given


def unpacked(append: Callable[[Any], None], given: _T) -> _T:
    """The same where it hands on all: as arguments, say."""
    kind = type(given)
    if kind is tuple and append is not NOTHING:
        kinds = list(map(type, given))  # type: ignore[call-overload]
        if kinds.count(Tensor) == len(kinds):  # the item that follows below, in C
            append((tuple, *kinds))
            return given
    if kind is not Tensor and append is not NOTHING:
        item_of = item_of_elements(kind)
        if item_of is not ignore:
            append(item_of(given))
    return given


def keys(append: Callable[[Any], None], given: _T) -> _T:
    """The same where Python makes a dict: it goes by keys, and hands the values on."""
    return _keys_first(append, given, True)


def ordered(append: Callable[[Any], None], given: _T) -> _T:
    """The same where it sorts: keys of a mapping differ, so no value is compared."""
    return _keys_first(append, given, False)


def _keys_first(append: Callable[[Any], None], given: _T, pairs: bool) -> _T:
    if append is not NOTHING:
        found = keys_of(given, pairs)
        elements(append, given) if found is None else append(Fixed(found))
    return given


def picked(append: Callable[[Any], None], given: Any) -> Any:
    """One of several values becomes what Python picks from, by comparing them.

    Numbers that follow nothing, as those of a schedule, may be compared in each pass: the one that
    is picked is looked at where it is used.
    """
    if append is not NOTHING:
        contents = contents_of(type(given))
        if contents is not None and not all(type(each) in NUMBERS for each in contents(given)):
            ordered(append, given)
    return given


def repeated(append: Callable[[Any], None], row: Any, given: _T) -> _T:
    """A number becomes a factor of what may be a list: it says how often that is repeated."""
    if append is NOTHING or type(row) not in _ROWS:
        return given
    numbers = all(type(each) in PLAIN or type(each) in NUMBERS for each in row)
    return value(append, given) if numbers else exact(append, given)


def _looked_at(append: Callable[[Any], None], function: Any, how: Callable[..., Any]) -> Any:
    """Note what code in C is about to call; what that gives back is looked at by `how`."""
    if append is NOTHING or function is None:
        return function
    function = called(append, function)
    if issubclass(type(function), type):
        return function
    function = taking(append, function)
    return lambda *given: how(append, *given, function(*given))


def keyed(append: Callable[[Any], None], function: Any) -> Any:
    """A function becomes what code in C calls, and goes by."""
    return _looked_at(append, function, lambda append, *given: exact(append, given[-1]))


def mapped(append: Callable[[Any], None], function: Any) -> Any:
    """The same where it hands on what the function gives back."""
    return _looked_at(append, function, lambda append, *given: value(append, given[-1]))


def ranked(append: Callable[[Any], None], of: Any, given: _T) -> _T:
    """A value becomes what something is sorted by, or picked by as the greatest.

    A plain value that is picked so is looked at where it is used.
    """
    kind = type(of)
    return given if kind in PLAIN or kind in NUMBERS else exact(append, given)


def ranking(append: Callable[[Any], None], function: Any) -> Any:
    """A function becomes what something is sorted by."""
    return _looked_at(append, function, ranked)


def called(append: Callable[[Any], None], function: Any) -> Any:
    """A callable is about to be called; what is to be called in its place."""
    if append is not NOTHING:
        kind = type(function)
        if kind is _FUNCTION:  # as `items._function`, in this very call: most are that
            home = function.__module__
            torchs = type(home) is str and IN_TORCH[home]
            append(function if torchs else function.__qualname__)
            if function.__name__ not in FACES and getattr(function, COMPILED, None) is None:
                return function
        else:
            append((CALLABLES.get(kind) or other_callable)(function))
            if issubclass(kind, Module) and not is_optimized_type(kind):
                return function
        return compiled_calls.instead_of(function, kind)
    return function


def method(append: Callable[[Any], None], function: Any) -> Any:
    """The same of an attribute: a tensor's method is what its name says."""
    if type(function) is _BUILTIN and type(function.__self__) is Tensor:
        return function
    return called(append, function)


def chosen_method(append: Callable[[Any], None], function: Any) -> Any:
    """The same, with arguments by which a container of Python's may pick."""
    if type(function) is not _BUILTIN:
        return called(append, function)
    return function if type(function.__self__) is Tensor else chosen(append, function)


def chosen(append: Callable[[Any], None], function: Any) -> Any:
    """`called`, with arguments by which a container of Python's may pick."""
    if append is NOTHING:
        return function
    kind = type(function)
    if kind is not _BUILTIN:
        function = called(append, function)
        return taking(append, function) if kind in WRAPPERS else function
    append(item_of_builtin(function))
    if function is operator.getitem:
        return taking(append, function)
    if function.__name__ not in _BY_PLACE or contents_of(type(function.__self__)) is None:
        return function

    def looked_at(*given: Any, **named: Any) -> Any:
        if given:
            place(append, given[0])
        return function(*given, **named)

    return looked_at


# By thread: what is told of calls of tapped functions, and gives what is called in their place.
taps: dict[int, Callable[[str, Any], Any]] = {}
_tap_of = taps.get


def tapped(site: str, function: Any) -> Any:
    """A function is about to be called at a place whose maps are wanted."""
    tap = _tap_of(ident())
    return function if tap is None else tap(site, function)


def fusing(function: Any) -> Any:
    """A function is about to be called by which torch may fuse layers, or that runs apart."""
    return apart.instead_of(instead_of(function))


def caught(site: str) -> None:
    """An exception is handled, or leaves a `with` block: where it came from is a decision, too."""
    append = append_of(ident())
    if append is not None:
        trace = sys.exc_info()[2]
        places: list[tuple[str, int, int]] = []
        # Torch's frames are others where there are hooks. An exception that is raised once more
        # has its old places after the new ones. Lines stay, however much of the code is tapped.
        while trace is not None:
            code = trace.tb_frame.f_code
            if id(code) in twins:
                place = (code.co_name, code.co_firstlineno, trace.tb_lineno)
                if places and place[:2] == places[0][:2]:
                    break
                places.append(place)
            trace = trace.tb_next
        append((site, *places))
