"""Which function of Python's a call runs, told without running code to find it."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.autograd import Function

_WRAPPED = (staticmethod, classmethod)
_CALL = nn.Module.__call__
_order_of: Callable[[type], Any] = type.__dict__["__mro__"].__get__


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
