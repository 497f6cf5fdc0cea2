"""What torch.compile has compiled: which modules, and with what. Read off them, never guessed."""

from __future__ import annotations

import gc
import sys
from typing import Any

from torch import nn

__all__ = ["around", "compiled_roots", "is_compiled", "is_optimized", "plain"]


def is_optimized(module: Any) -> bool:
    """Whether it is what `torch.compile(module)` returns: a module around the plain one."""
    home = sys.modules.get("torch._dynamo.eval_frame")  # imported by the first torch.compile
    return home is not None and isinstance(module, home.OptimizedModule)


def is_compiled(module: nn.Module) -> bool:
    """Whether calls of it run compiled code: after `torch.compile(module)`, `module.compile()`."""
    return is_optimized(module) or module.__dict__.get("_compiled_call_impl") is not None


def plain(module: nn.Module) -> nn.Module:
    """The module inside `torch.compile(module)`; any other one as it is."""
    while is_optimized(module):
        module = module._orig_mod  # type: ignore[assignment]
    return module


def compiled_roots(model: nn.Module) -> list[nn.Module]:
    """The outermost compiled modules in a model, itself included, each once."""
    found: dict[nn.Module, None] = {}
    seen: set[nn.Module] = set()

    def walk(module: nn.Module) -> None:
        if module in seen:
            return
        seen.add(module)
        if is_compiled(module):
            found[module] = None
            return
        for child in module.children():
            walk(child)

    walk(model)
    return list(found)


def around(model: nn.Module) -> list[nn.Module]:
    """What `torch.compile(model)` has returned so far and is alive; the model does not know it."""
    home = sys.modules.get("torch._dynamo.eval_frame")
    if home is None:
        return []
    return [o for o in gc.get_objects() if type(o) is home.OptimizedModule and plain(o) is model]
