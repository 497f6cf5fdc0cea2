"""Doors: the submodules that a model's methods call when nobody calls its `forward`.

`model.encode(x)` runs parts of the model outside of a pass. Their maps are not captured, and that
is to be named, which takes a hook on something that runs. Inside a region there are hooks on taps
only; so whatever a method other than `forward` mentions gets one, unless there is a tap in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from fmapkit.torchlib.caching import remembered
from fmapkit.torchlib.nested import modules_in


def doors(region: nn.Module, tapped: Set[nn.Module]) -> list[nn.Module]:
    """The modules in a region that its methods, or those of modules in it, may call directly.

    Args:
        tapped: have hooks already; a call of what they are in does not go unseen.
    """
    found: dict[nn.Module, None] = {}
    for module in modules_in(region):
        if not module._modules:
            continue
        for name in _mentioned(type(module)).intersection(module._modules):
            child = module._modules[name]
            if child is not None and not tapped & {*modules_in(child)}:
                found[child] = None
    return list(found)


@remembered
def _mentioned(kind: type) -> frozenset[str]:
    """The attributes that methods of a class mention."""
    return frozenset(name for code in _methods(kind) for name in _names(code))


def _methods(kind: type) -> Iterator[CodeType]:
    """The code of a class's methods, but for those that run in a pass or before one."""
    for base in kind.__mro__:
        if base is nn.Module or base.__module__.startswith("torch.nn.modules."):
            return
        for name, value in vars(base).items():
            function: Any = getattr(value, "__wrapped__", value)  # @torch.no_grad() and the like
            if name not in ("forward", "__init__") and isinstance(function, FunctionType):
                yield function.__code__


def _names(code: CodeType) -> Iterator[str]:
    """The attributes that it mentions, also in comprehensions and functions inside."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
