"""What a twin calls at each decision (see `rewrite.py`), and where the decisions go.

An item of a path is a mark (a string that names a place in the source), a plain value, or the
callable that a call went to. Items are compared by equality, so each is of a kind for which that is
cheap and runs no code of the model: tensors are never items.

Recorders run in whatever thread runs a twin. They write only where that thread records.
"""

from __future__ import annotations

import builtins
import functools
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from fmapkit.torchlib.class_cache import remembered
from fmapkit.torchlib.fused_paths import instead_of

__all__ = ["MARK", "RECORDERS", "DecisionSink", "start", "stop", "taps", "unrecorded"]

_T = TypeVar("_T")

# What marks begin with: no string of a model does.
MARK = "\0"
_ident: Callable[[], int] = threading.get_ident
_PLAIN: frozenset[type] = frozenset(
    {
        *(int, str, bytes, complex, type(None), type(...), range),
        *(torch.dtype, torch.device, torch.layout, torch.memory_format),
    }
)
_NESTED: frozenset[type] = frozenset({tuple, list, dict, set, frozenset, slice, torch.Size})
_FUNCTION = types.FunctionType
_BUILTIN = types.BuiltinFunctionType
_CONTAINERS = frozenset({dict, list, tuple, set, str})
_SHARED = frozenset({type(None), types.ModuleType})
_NOTHING: Callable[[Any], None] = deque(maxlen=0).append
_TRUE, _FALSE = f"{MARK}True", f"{MARK}False"


class DecisionSink:
    """Where one thread's items go while it records.

    Args:
        place_of: names the place of a parameter in the model; None for any other tensor.
        modules: those of the model.

    Attributes:
        items: the decisions taken so far.
        users: how many captures record.
    """

    __slots__ = ("items", "modules", "place_of", "users")

    def __init__(
        self, place_of: Callable[[Tensor], str | None], modules: Container[nn.Module]
    ) -> None:
        self.items: list[Any] = []
        self.place_of = place_of
        self.modules = modules
        self.users = 0


# By thread: the `append` of its list of items, and what it belongs to.
_appends: dict[int, Callable[[Any], None]] = {}
_append_of: Any = _appends.get
sinks: dict[int, DecisionSink] = {}
twins: set[int] = set()  # the code that calls us, told by its identity: it is kept


def start(place_of: Callable[[Tensor], str | None], modules: Container[nn.Module]) -> DecisionSink:
    """Record in this thread; where that is done already, go on with it."""
    thread = _ident()
    sink = sinks.get(thread)
    if sink is None:
        sink = sinks[thread] = DecisionSink(place_of, modules)
        _appends[thread] = sink.items.append
    sink.users += 1
    return sink


def stop() -> None:
    """Record no more in this thread, unless somebody else does."""
    thread = _ident()
    sink = sinks.get(thread)
    if sink is not None:
        sink.users -= 1
        if not sink.users:
            del _appends[thread], sinks[thread]


@contextmanager
def unrecorded() -> Iterator[None]:
    """What runs here in this thread is no part of the pass that is under way."""
    thread = _ident()
    sink, append = sinks.pop(thread, None), _appends.pop(thread, None)
    try:
        yield
    finally:
        if sink is not None and append is not None:
            sinks[thread], _appends[thread] = sink, append


def enter(site: str) -> Callable[[Any], None]:
    """A function begins; what its items are to be given to while it runs."""
    append: Callable[[Any], None] = _append_of(_ident(), _NOTHING)
    append(site)
    return append


def current() -> Callable[[Any], None]:
    """The same of code that has no variable for it."""
    append: Callable[[Any], None] = _append_of(_ident(), _NOTHING)
    return append


def resumed(site: str, given: _T) -> _T:
    """A generator goes on after a `yield`: it may have been left there in an earlier pass."""
    append = _append_of(_ident())
    if append is not None:
        append(site)
    return given


# Past what a metaclass may say.
_name_of: Callable[[type], Any] = type.__dict__["__qualname__"].__get__
_bases_of: Callable[[type], Any] = type.__dict__["__bases__"].__get__

# What follows asks for types, and never for `isinstance`: that may run code of the model's.


def value(append: Callable[[Any], None], given: _T) -> _T:
    """A value becomes an argument, an index or an exponent."""
    kind = type(given)
    if kind is not Tensor:
        if kind in _PLAIN:
            append(given)
        elif append is not _NOTHING:
            item_of = _ITEM_OF.get(kind) or _item_of(kind)
            if item_of is not _ignore:
                append(item_of(given))
    return given


@remembered
def _item_of(kind: type) -> Callable[[Any], Any]:
    """What makes an item of values of a class that is none of those named here."""
    if issubclass(kind, Tensor):
        return _tensor
    if issubclass(kind, (int, float, str, np.generic)):
        return lambda given: (kind, str(given))
    return _ignore


def _ignore(_: Any) -> None:
    """Nothing is recorded: what becomes of it is, where it decides something."""


def _tensor(given: Any) -> Any:
    """Whose parameter a tensor is; its type, if it is none."""
    sink = sinks.get(_ident())
    place = sink.place_of(given) if sink is not None else None
    return type(given) if place is None else place


def _row(given: Any) -> Any:
    """A tuple or a list; mostly a shape, or arguments that are passed on."""
    found: list[Any] = [type(given)]
    for value in given:
        kind = type(value)
        found.append(
            value if kind in _PLAIN else Tensor if kind is Tensor else _flat(value, depth=1)
        )
    return tuple(found)


def _dict(given: Any) -> Any:
    """A dict; mostly keyword arguments that are passed on."""
    found: list[Any] = [dict]
    for key, value in given.items():
        kind = type(value)
        if type(key) is not str:
            key = _flat(key, depth=1)
        found.append(
            (key, value if kind in _PLAIN else Tensor if kind is Tensor else _flat(value, depth=1))
        )
    return tuple(found)


def _flat(given: Any, depth: int = 0) -> Any:
    """What is plain in a container, with the types of the rest: a copy, which stays as it is."""
    kind = type(given)
    if kind in _PLAIN:
        return given
    if kind is Tensor:
        return Tensor
    if kind is bool or kind is float:
        return kind, given
    if kind in _NESTED and depth < 8:
        depth += 1
        if kind is dict:
            return (dict, *[(_flat(k, depth), _flat(v, depth)) for k, v in given.items()])
        if kind is slice:
            return (slice, *[_flat(v, depth) for v in (given.start, given.stop, given.step)])
        if kind in (set, frozenset):
            return (kind, len(given))
        return (kind, *[_flat(v, depth) for v in given])
    if issubclass(kind, Tensor):
        return _tensor(given)
    if issubclass(kind, np.generic):
        return kind, str(given)
    return _class(kind)


def called(append: Callable[[Any], None], function: _T) -> _T:
    """A callable is about to be called."""
    if append is not _NOTHING:
        kind = type(function)
        if kind is _BUILTIN and type(function.__self__) is Tensor:  # type: ignore[attr-defined]
            append(function.__name__)  # type: ignore[attr-defined]
        else:
            append((_CALLABLES.get(kind) or _other_callable)(function))
    return function


def _callable(function: Any) -> Any:
    """What tells a callable from others, in every pass alike."""
    kind = type(function)
    return (_CALLABLES.get(kind) or _other_callable)(function)


def _function(function: Any) -> Any:
    """Those of the model's own code may be made anew in each pass: they go by their name.

    By their first mark they tell which they are.
    """
    home = function.__module__
    return function if type(home) is str and home.startswith("torch.") else function.__qualname__


def _builtin(function: Any) -> Any:
    """A function of C code, or a method of that."""
    owner = type(function.__self__)
    if owner in _CONTAINERS:
        return function.__name__
    if owner in _SHARED or issubclass(owner, type):
        return function
    if owner is not Tensor and issubclass(owner, Tensor):
        return _tensor(function.__self__), function.__name__
    return function.__name__


def _method(function: Any) -> Any:
    """A function with what it is bound to."""
    inner = function.__func__
    name = inner.__qualname__ if type(inner) is _FUNCTION else type(inner)
    return _callable(function.__self__), name


def _partial(function: Any) -> Any:
    """A function with some of its arguments."""
    arguments = _flat(function.args), _flat(function.keywords)
    return functools.partial, _callable(function.func), *arguments


def _other_callable(function: Any) -> Any:
    """Modules and other objects; one that was made in the pass goes by its class."""
    kind = type(function)
    if issubclass(kind, nn.Module):
        # Those of the model, and others that are kept, are compared by identity.
        sink = sinks.get(_ident())
        return function if sink is not None and function in sink.modules else _class(kind)
    return _class(function if issubclass(kind, type) else kind)


def _class(given: Any) -> Any:
    """A class; one that a function makes anew in each pass goes by its name, and by its bases."""
    name: str = _name_of(given)
    return given if "<locals>" not in name else (name, *map(_class, _bases_of(given)))


_CALLABLES: dict[type, Callable[[Any], Any]] = {
    _FUNCTION: _function,
    _BUILTIN: _builtin,
    types.MethodType: _method,
    functools.partial: _partial,
}
# 1, 1.0 and True are equal.
_ITEM_OF: dict[type, Callable[[Any], Any]] = {
    **_CALLABLES,
    bool: lambda given: _TRUE if given else _FALSE,
    float: lambda given: (float, given),
    torch.Size: lambda given: (torch.Size, *given),
    tuple: _row,
    list: _row,
    dict: _dict,
    **dict.fromkeys((set, frozenset, slice), _flat),
    nn.Parameter: _tensor,
}


# By thread: what is told of calls of tapped functions, and gives what is called in their place.
taps: dict[int, Callable[[str, Any], Any]] = {}
_tap_of = taps.get


def tapped(site: str, function: Any) -> Any:
    """A function is about to be called at a place whose maps are wanted."""
    tap = _tap_of(_ident())
    return function if tap is None else tap(site, function)


def fusing(function: Any) -> Any:
    """A function is about to be called by which torch may fuse layers (see `FUSING_CALLS`)."""
    return instead_of(function)


def caught(site: str) -> None:
    """An exception is handled, or leaves a `with` block: where it came from is a decision, too."""
    append = _append_of(_ident())
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


# By the names that stand for them in a twin before it is finished.
RECORDERS: dict[str, Any] = {
    f"{MARK}{f.__name__}": f
    for f in (enter, current, resumed, value, called, tapped, fusing, caught, type, Tensor)
}


# Where a twin runs on after its block has ended (a generator's, say), it finds copies of them
# there: torch.compile takes what is among the builtins for a builtin. No name of a model's is one
# of these.
for _name, _recorder in RECORDERS.items():
    if type(_recorder) is _FUNCTION:
        _recorder = _FUNCTION(_recorder.__code__, _recorder.__globals__, _recorder.__name__)
    setattr(builtins, _name, _recorder)


def _traced_as(recorder: Callable[..., Any], instead: Callable[..., Any]) -> None:
    """Have torch.compile see something else where it traces a twin."""
    recorder._torchdynamo_inline = instead  # type: ignore[attr-defined]


_traced_as(enter, lambda site: _ignore)
_traced_as(current, lambda: _ignore)
_traced_as(caught, lambda site: None)
_traced_as(resumed, lambda site, given: given)
_traced_as(value, lambda append, given: given)
_traced_as(called, lambda append, function: function)
_traced_as(tapped, lambda site, function: function)
_traced_as(fusing, lambda function: function)
