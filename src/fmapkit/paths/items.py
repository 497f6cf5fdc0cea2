"""The items of a path: what is recorded of a value, and what of a callable.

An item is a mark (a string that names a place in the source), a plain value, or the callable that a
call went to. Items are compared by equality, so each is of a kind for which that is cheap and runs
no code of the model: tensors are never items.

What is here asks for types, and never for `isinstance`: that may run code of the model's.
"""

from __future__ import annotations

import enum
import functools
import operator
import types
from collections.abc import Callable, Iterable
from datetime import date
from decimal import Decimal
from fractions import Fraction
from pathlib import PosixPath, WindowsPath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import Function

from fmapkit.paths.rewriting import MARK
from fmapkit.paths.sinks import ident, sinks
from fmapkit.torchlib.caching import remembered
from fmapkit.torchlib.modes import mode_count
from fmapkit.torchlib.operators import without_torch_function

PLAIN: frozenset[type] = frozenset(
    {
        *(int, str, bytes, complex, type(None), type(...), range),
        *(torch.dtype, torch.device, torch.layout, torch.memory_format),
    }
)
_NESTED: frozenset[type] = frozenset({tuple, list, dict, set, frozenset, slice, torch.Size})
_FUNCTION = types.FunctionType
_BUILTIN = types.BuiltinFunctionType
# Values of Python's own library that are keys, and whose text tells them from others.
_AS_TEXT = frozenset({Decimal, Fraction, PosixPath, WindowsPath, date})
_CONTAINERS = frozenset({dict, list, tuple, set, str})
NUMBERS = frozenset({int, float, bool})
_SHARED = frozenset({type(None), types.ModuleType})
_METHODS_IN_C = types.MethodDescriptorType, types.WrapperDescriptorType
_OPERATORS = type(torch.ops.aten.neg), type(torch.ops.aten.neg.default)
TRUE, FALSE = f"{MARK}True", f"{MARK}False"
_NO_KEYS = (dict,)
_YES, _NO = (bool, True), (bool, False)

# What of the attributes of a module that no guard looks at is compared.
_TOLD = frozenset({bool, int, float, str, type(None)})
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_WRAPPED = (staticmethod, classmethod)

# Past what a metaclass may say.
_name_of: Callable[[type], Any] = type.__dict__["__qualname__"].__get__
_bases_of: Callable[[type], Any] = type.__dict__["__bases__"].__get__
_order_of: Callable[[type], Any] = type.__dict__["__mro__"].__get__


class _InTorch(dict[str, bool]):
    """By the name of a module: whether it is a part of torch."""

    def __missing__(self, name: str) -> bool:
        found = self[name] = name.startswith("torch.")
        return found


IN_TORCH = _InTorch()


class Fixed(tuple[Any, ...]):
    """An item of which no number may follow the sizes of the inputs: Python itself picks by it."""

    __slots__ = ()


@remembered
def item_of_class(kind: type) -> Callable[[Any], Any]:
    """What makes an item of values of a class that is none of those named here."""
    if issubclass(kind, Tensor):
        return tensor_item
    if issubclass(kind, enum.Enum):
        return _member
    for plain in (int, float, str, bytes):
        if issubclass(kind, plain):
            return lambda given: (class_of(kind), plain.__repr__(given))
    if kind in _AS_TEXT or issubclass(kind, (np.generic, np.dtype)):
        return lambda given: (class_of(kind), str(given))
    if issubclass(kind, type):
        return class_of
    if issubclass(kind, (tuple, list)) or _is_a_key(kind):
        return flat
    return other_callable if issubclass(kind, nn.Module) else ignore


@remembered
def _parts_of(kind: type) -> Callable[[Any], Iterable[Any]] | None:
    """What gives the parts of a value by which it is compared, past what its class may say."""
    for row in (tuple, list):
        if issubclass(kind, row):
            return row.__iter__
    if not _is_a_key(kind):
        return None
    fields = kind.__dict__["__dataclass_fields__"].items()
    names = [name for name, field in fields if field.compare]
    return lambda given: [_attribute(given, name) for name in names]


def _is_a_key(kind: type) -> bool:
    """Whether values of a dataclass are equal where their fields are, and may be keys of dicts."""
    how: Any = kind.__dict__.get("__dataclass_params__")
    return how is not None and bool(how.eq and (how.frozen or how.unsafe_hash))


def _attribute(given: Any, name: str) -> Any:
    try:
        return object.__getattribute__(given, name)
    except AttributeError:  # it may have been deleted
        return None


def _member(given: Any) -> Any:
    """A member of an enumeration; of flags that are set together, the name may be None."""
    own = object.__getattribute__(given, "__dict__")
    return _name_of(type(given)), own.get("_name_"), flat(own.get("_value_"), depth=1)


def ignore(_: Any) -> None:
    """Nothing is recorded: what becomes of it is, where it decides something."""


def tensor_item(given: Any) -> Any:
    """Whose parameter a tensor is; its type, if it is none."""
    sink = sinks.get(ident())
    place = sink.place_of(given) if sink is not None else None
    return type(given) if place is None else place


def row(given: Any, part: Callable[[Any], Any] | None = None) -> Any:
    """A tuple or a list; mostly a shape, or arguments that are passed on.

    Args:
        part: gives the item of what is no plain value and no tensor in it; None for `flat`.
    """
    found: list[Any] = [type(given)]
    for value in given:
        kind = type(value)
        if kind in PLAIN or kind is Tensor:
            found.append(Tensor if kind is Tensor else value)
        else:
            found.append(flat(value, depth=1) if part is None else part(value))
    return tuple(found)


def _dict(given: Any) -> Any:
    """A dict; mostly keyword arguments that are passed on."""
    if not given:
        return _NO_KEYS
    found: list[Any] = [dict]
    for key, value in given.items():
        kind = type(value)
        found += (
            key if type(key) is str else flat(key, depth=1),
            value if kind in PLAIN else Tensor if kind is Tensor else flat(value, depth=1),
        )
    return tuple(found)


def flat(given: Any, depth: int = 0) -> Any:
    """What is plain in a container, with the types of the rest: a copy, which stays as it is."""
    kind = type(given)
    if kind in PLAIN:
        return given
    if kind is Tensor:
        return Tensor
    if kind is bool:
        return _YES if given else _NO
    if kind is float:
        return kind, given
    if kind is np.ndarray and not given.ndim:  # a bound of a slice, say
        return kind, given.item()
    if kind in _NESTED and depth < 8:
        depth += 1
        if kind is dict:
            return (dict, *[(flat(k, depth), flat(v, depth)) for k, v in given.items()])
        if kind is slice:
            return (slice, *[flat(v, depth) for v in (given.start, given.stop, given.step)])
        if kind is set:
            return (kind, len(given))
        if kind is frozenset:
            return (kind, frozenset(flat(v, depth) for v in given))
        return (kind, *[flat(v, depth) for v in given])
    if kind in CALLABLES:
        return _callable(given)
    parts_of = _parts_of(kind)
    if parts_of is not None:  # classes of named tuples may be made anew in each pass
        rest = [] if depth >= 8 else [flat(v, depth + 1) for v in parts_of(given)]
        return (_name_of(kind), *rest)
    item_of = item_of_class(kind)
    return class_of(kind) if item_of is ignore else item_of(given)


def _callable(function: Any) -> Any:
    """What tells a callable from others, in every pass alike."""
    kind = type(function)
    return (CALLABLES.get(kind) or other_callable)(function)


def _function(function: Any) -> Any:
    """Those of the model's own code may be made anew in each pass: they go by their name.

    By their first mark they tell which they are.
    """
    home = function.__module__
    return function if type(home) is str and IN_TORCH[home] else function.__qualname__


def item_of_builtin(function: Any) -> Any:
    """A function of C code, or a method of that."""
    owner = type(function.__self__)
    if owner is Tensor or owner in _CONTAINERS:
        return function.__name__
    if owner in _SHARED or issubclass(owner, type):
        return function
    if issubclass(owner, Tensor):
        return tensor_item(function.__self__), function.__name__
    return function.__name__


def _method(function: Any) -> Any:
    """A function with what it is bound to."""
    inner = function.__func__
    name = inner.__qualname__ if type(inner) is _FUNCTION else type(inner)
    owner = function.__self__
    return _class_told_by(type(owner)) or _callable(owner), name


@remembered
def _class_told_by(kind: type) -> Any:
    """What all objects of a class go by where they are called; None where each tells."""
    each = kind in CALLABLES or issubclass(kind, (nn.Module, type))
    return None if each else class_of(kind)


def _itself(function: Any) -> Any:
    """A method of a class in C, or an operator: there is one of each."""
    return function


def _wrapper(function: Any) -> Any:
    """A method in C with what it is bound to: the call of a function, say."""
    return _callable(function.__self__), function.__name__


def _getter(function: Any) -> Any:
    """What gets items or attributes, or calls a method, of whatever it is given."""
    kind, given = function.__reduce__()
    indices = [FORMS[type(each)](each) for each in given if type(each) in FORMS]
    return _callable(kind), flat(given), *indices  # with keywords, it is made by a partial function


def _around(function: Any) -> Any:
    """A callable in C around another one, which it may not run each time it is called."""
    return type(function), _callable(function.__wrapped__)


def _partial(function: Any) -> Any:
    """A function with some of its arguments."""
    arguments = flat(function.args), flat(function.keywords)
    return functools.partial, _callable(function.func), *arguments


def other_callable(function: Any) -> Any:
    """Modules and other objects; one that was made in the pass goes by its class."""
    kind = type(function)
    if not issubclass(kind, nn.Module):
        return class_of(function if issubclass(kind, type) else kind)
    sink = sinks.get(ident())
    if sink is not None and function in sink.modules:
        return function  # the guards of the model look at what is in it
    return _condition(function)


def _condition(module: nn.Module) -> Any:
    """What tells how a module will run that is not the model's: no guard looks at it.

    It may be made anew in each pass. No code of its own is run.
    """
    sink, found = sinks.get(ident()), []
    parts, seen = [module], {id(module)}
    for part in parts:  # which grows
        own = object.__getattribute__(part, "__dict__")
        told = [(n, flat(v)) for n, v in own.items() if type(v) in _TOLD]
        hooks = [n for name in _HOOKS for n in own.get(name, ())]
        found.append((class_of(type(part)), *told, tuple(hooks)))
        for child in own.get("_modules", {}).values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                parts.append(child)
        if sink is not None:
            sink.met(type(part))
    return Fixed(tuple(found))


def class_of(given: Any) -> Any:
    """A class; one that a function makes anew in each pass goes by its name, and by its bases."""
    name: str = _name_of(given)
    return given if "<locals>" not in name else (name, *map(class_of, _bases_of(given)))


CALLABLES: dict[type, Callable[[Any], Any]] = {
    _FUNCTION: _function,
    _BUILTIN: item_of_builtin,
    types.MethodType: _method,
    functools.partial: _partial,
    **dict.fromkeys((*_METHODS_IN_C, *_OPERATORS, np.ufunc), _itself),
    types.MethodWrapperType: _wrapper,
    **dict.fromkeys((type(functools.cache(len)), staticmethod), _around),
    **dict.fromkeys((operator.attrgetter, operator.itemgetter, operator.methodcaller), _getter),
}
# 1, 1.0 and True are equal.
ITEM_OF: dict[type, Callable[[Any], Any]] = {
    **CALLABLES,
    bool: lambda given: TRUE if given else FALSE,
    float: lambda given: (float, given),
    torch.Size: lambda given: (torch.Size, *given),
    tuple: row,
    list: row,
    dict: _dict,
    **dict.fromkeys((set, frozenset, slice), flat),
    nn.Parameter: tensor_item,
}


def _form_of(given: Tensor) -> Any:
    """By which an index makes a view, or a copy, and of which axes: nobody sees us ask."""
    if mode_count():
        with without_torch_function():
            return Fixed((Tensor, given.ndim, given.dtype))
    return Fixed((Tensor, given.ndim, given.dtype))


FORMS: dict[type, Callable[[Any], Any]] = {
    Tensor: _form_of,
    nn.Parameter: _form_of,
    np.ndarray: lambda given: Fixed((np.ndarray, given.ndim, given.dtype.str)),
}


# -- which function of Python's a call runs, told without running code to find it ----------------

_CALL = nn.Module.__call__


def function_at(to: Any, name: str | None) -> Any:
    """The function of Python's that a call runs, if no code has to run to find it."""
    kind = type(to)
    if issubclass(kind, nn.Module):
        if kind.__getattribute__ is not object.__getattribute__:
            return None
        own = object.__getattribute__(to, "__dict__")
        if name is None:
            return _forward_of(to)
        child = own["_modules"].get(name)
        return _forward_of(child) if child is not None else own.get(name) or _in_class(kind, name)
    if name is None:
        return to
    if kind is types.ModuleType:
        return vars(to).get(name)
    if kind is type(Function) and name == "apply":
        return _in_class(to, "forward") if _in_class(to, name) is _APPLY else None
    return _in_class(to, name) if kind is type else None


def _forward_of(module: nn.Module) -> Any:
    """The forward that a call of a module runs, if that is its class's own."""
    kind = type(module)
    if kind.__getattribute__ is not object.__getattribute__ or kind.__call__ is not _CALL:
        return None
    return None if "forward" in module.__dict__ else _in_class(kind, "forward")


def _in_class(kind: type, name: str) -> Any:
    for base in _order_of(kind):
        if name in base.__dict__:
            found = base.__dict__[name]
            return found.__func__ if type(found) in _WRAPPED else found
    return None


_APPLY = _in_class(Function, "apply")
