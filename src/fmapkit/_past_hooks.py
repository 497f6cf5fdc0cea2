"""Modules that run without a call that torch knows of, so that no hook of theirs runs.

That is `child.forward(x)`, and a class with a `__call__` of its own. Python's stack tells.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from types import CodeType
from typing import Any

import torch
from torch import nn

__all__ = ["HOW", "PastHooks", "has_own_call"]

_CALL = nn.Module._call_impl.__code__

# How a module is called past its hooks: by which method, and what that means for it.
HOW = {
    "forward": "its forward was called directly, which runs no hooks",
    "__call__": "its class has a __call__ of its own, which runs without hooks",
}


class PastHooks:
    """Finds such modules.

    Args:
        modules: of a model.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._codes: dict[CodeType, str] = {}
        for kind in {type(module) for module in modules}:
            if not issubclass(kind, torch.jit.ScriptModule):
                self._codes.update(_codes(kind))

    def running(self, entered: nn.Module | None = None) -> list[tuple[nn.Module, str]]:
        """Those inside the innermost call that torch knows of, each with the method.

        Args:
            entered: a module whose call has just begun: what is meant is what called it.
        """
        at: Any = sys._getframe(1)
        if entered is not None:
            while at is not None and at.f_code is not _CALL:
                at = at.f_back
            at = at.f_back if at is not None else None
        codes, found = self._codes, []
        while at is not None and at.f_code is not _CALL:
            if at.f_code in codes:
                found.append(at)
            at = at.f_back
        if not found:
            return []
        around = at.f_locals.get("self") if at is not None else None
        modules = [(f.f_locals.get(f.f_code.co_varnames[0]), codes[f.f_code]) for f in found]
        return [
            (module, method)
            for module, method in modules
            if isinstance(module, nn.Module) and module is not around and module is not entered
        ]

    def method_of(self, module: nn.Module) -> str | None:
        """The method by which a module that is running was called past its hooks, if it was."""
        at: Any = sys._getframe(1)
        method = None
        while at is not None:
            if at.f_code is _CALL and at.f_locals.get("self") is module:
                return None
            if at.f_code in self._codes and at.f_locals.get(at.f_code.co_varnames[0]) is module:
                method = self._codes[at.f_code]
            at = at.f_back
        return method


def has_own_call(module: nn.Module) -> bool:
    """Whether its class has a `__call__` of its own; torch's own go on to `nn.Module`'s."""
    call: Any = type(module).__call__
    return call is not nn.Module.__call__ and not call.__module__.startswith("torch.")


def _codes(kind: type[nn.Module]) -> dict[CodeType, str]:
    """The code that runs where a class's module is called past its hooks, and by which method."""
    found: dict[CodeType, str] = {}
    for method in HOW:
        function = getattr(kind, method)
        code = getattr(inspect.unwrap(function), "__code__", None)
        if code is not None and code.co_argcount and function is not getattr(nn.Module, method):
            found[code] = method
    return found
