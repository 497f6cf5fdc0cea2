"""Modules that run without a call that torch knows of, so that no hook of theirs runs.

That is `child.forward(x)`, and a class with a `__call__` of its own. Python's stack tells. And
doors: the submodules that a model's methods call when nobody calls its `forward`. `model.encode(x)`
runs parts of the model outside of a pass. Their maps are not captured, and that is to be named,
which takes a hook on something that runs. Inside a region there are hooks on taps only; so whatever
a method other than `forward` mentions gets one, unless there is a tap in it, or the method tells of
its calls itself.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection, Iterator, Sequence, Set
from types import CodeType, FrameType, FunctionType
from typing import Any

import torch
from torch import nn

from fmapkit.torchlib.caching import remembered
from fmapkit.torchlib.nested import modules_in

_WRAPPED = nn.Module._wrapped_call_impl.__code__
_CALL = nn.Module._call_impl.__code__
# What calls the forward where a module has hooks.
_INNER = next((c for c in _CALL.co_consts if isinstance(c, CodeType)), _CALL)

_Place = tuple[str, int, str]

# How a module is called past its hooks: by which method, and what that means for it.
HOW = {
    "forward": "its forward was called directly, which runs no hooks",
    "__call__": "its class has a __call__ of its own, which runs without hooks",
}


class PastHooks:
    """Finds such modules."""

    def __init__(self, modules: Collection[nn.Module]) -> None:
        self._modules = modules
        self._known: dict[_Place, str] | None = None
        self._methods: dict[int, tuple[CodeType, str | None]] = {}  # by code: the same
        self._lent = False  # some module may run the forward of another one

    def _places(self) -> dict[_Place, str]:
        """Where the code begins that runs in such a call; read when first asked for."""
        if self._known is None:
            self._known = {}
            for kind in {type(module) for module in self._modules}:
                if not issubclass(kind, torch.jit.ScriptModule):
                    self._known.update(_places(kind))
            self._lent = any("forward" in module.__dict__ for module in self._modules)
        return self._known

    def running(
        self, at: FrameType | None, entered: nn.Module | None = None
    ) -> Sequence[tuple[nn.Module, str]]:
        """Those inside the innermost call that torch knows of, each with the method.

        They are looked for from a frame outwards; of a module whose call has just begun, from what
        called it.
        """
        if entered is not None:
            while at is not None and at.f_code is not _WRAPPED:
                at = at.f_back
            at = at.f_back if at is not None else None
        methods = self._methods
        found: list[tuple[FrameType, str]] = []
        while at is not None and at.f_code is not _CALL:
            code = at.f_code
            known = methods.get(id(code))
            if known is None or known[0] is not code:
                known = methods[id(code)] = code, self._places().get(_place(code))
            if known[1] is not None:
                caller = at.f_back
                torchs = caller is not None and (caller.f_code is _CALL or caller.f_code is _INNER)
                if torchs and not found and not self._lent:
                    return ()  # it is the forward of the module whose call torch is in
                found.append((at, known[1]))
            at = at.f_back
        if not found:
            return ()
        around = at.f_locals.get("self") if at is not None else None
        modules = [(f.f_locals.get(f.f_code.co_varnames[0]), method) for f, method in found]
        return [
            (module, method)
            for module, method in modules
            if isinstance(module, nn.Module) and module is not around and module is not entered
        ]

    def method_of(self, module: nn.Module) -> str | None:
        """The method by which a module that is running was called past its hooks, if it was."""
        places = self._places()
        at: Any = sys._getframe(1)
        method = None
        while at is not None:
            if at.f_code is _CALL and at.f_locals.get("self") is module:
                return None
            how = places.get(_place(at.f_code))
            if how is not None and at.f_locals.get(at.f_code.co_varnames[0]) is module:
                method = how
            at = at.f_back
        return method


def has_own_call(module: nn.Module) -> bool:
    """Whether its class has a `__call__` of its own; torch's own go on to `nn.Module`'s."""
    call: Any = type(module).__call__
    return call is not nn.Module.__call__ and not call.__module__.startswith("torch.")


def _place(code: CodeType) -> _Place:
    """Where code begins, and its name: while it records, other code of that place runs for it."""
    return code.co_filename, code.co_firstlineno, code.co_name


def _places(kind: type[nn.Module]) -> dict[_Place, str]:
    """The code that runs where a class's module is called past its hooks, and by which method."""
    found: dict[_Place, str] = {}
    for method in HOW:
        function = getattr(kind, method)
        code = getattr(inspect.unwrap(function), "__code__", None)
        if code is not None and code.co_argcount and function is not getattr(nn.Module, method):
            found[_place(code)] = method
    return found


# -- doors -----------------------------------------------------------------------------------------


def doors(
    region: nn.Module, tapped: Set[nn.Module], telling: Callable[[FunctionType], bool]
) -> list[nn.Module]:
    """The modules in a region that its methods, or those of modules in it, may call directly.

    Args:
        region: the module that is replayed.
        tapped: a call of what these are in does not go unseen: they have hooks already.
        telling: which methods tell of their calls, wherever they come from.
    """
    found: dict[nn.Module, None] = {}
    for module in modules_in(region):
        children = module._modules
        if not children:
            continue
        for function, names in _methods(type(module)):
            for name in () if telling(function) else names.intersection(children):
                child = children[name]
                if child is not None and not tapped & {*modules_in(child)}:
                    found[child] = None
    return list(found)


@remembered
def _methods(kind: type) -> list[tuple[FunctionType, frozenset[str]]]:
    """The methods of a class that run neither in a pass nor before one; what each mentions."""
    found: list[tuple[FunctionType, frozenset[str]]] = []
    for base in kind.__mro__:
        if base is nn.Module or base.__module__.startswith("torch.nn.modules."):
            break
        for name, value in vars(base).items():
            function: Any = getattr(value, "__wrapped__", value)  # @torch.no_grad() and the like
            if name not in ("forward", "__init__") and isinstance(function, FunctionType):
                found.append((function, frozenset(_names(function.__code__))))
    return found


def _names(code: CodeType) -> Iterator[str]:
    """The attributes that it mentions, also in comprehensions and functions inside."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
