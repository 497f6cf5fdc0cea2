"""What is trusted, by its name, to do one thing: parts of torch, of Python and of einops."""

from __future__ import annotations

import ast
import builtins
import types
from functools import lru_cache
from typing import Any

import torch
from torch import nn

__all__ = [
    *("JIT_QUESTIONS", "is_of_torch", "is_trusted_callable", "is_trusted_function"),
    *("is_trusted_method", "is_trusted_module"),
]

# Questions that have nothing to do with data.
JIT_QUESTIONS = (torch.jit.is_scripting, torch.jit.is_tracing)  # type: ignore[attr-defined]
_BUILTINS = {
    *("len", "range", "int", "float", "list", "tuple", "dict", "isinstance", "enumerate", "zip"),
    *("reversed", "str", "bool", "print", "round", "sum", "abs", "slice"),
}
_CONTAINER_METHODS = {
    *("append", "extend", "insert", "items", "values", "keys", "copy", "format", "reverse", "pop"),
    *("children", "named_children"),
}
# Tensor methods whose result is a Python value taken from the data, or that run other code.
_LEAKS = {
    *("item", "tolist", "numpy", "__bool__", "apply_", "map_", "map2_", "register_hook"),
    "backward",
}
_FUNCTION_MODULES = {"torch.nn.functional", "torch.functional", "torch._jit_internal", "math"}


def is_trusted_module(module: nn.Module) -> bool:
    """torch's own modules of one operation, and `nn.Sequential`."""
    kind = type(module)
    if kind is nn.Sequential:
        return True
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.Transformer)):
        return False
    home = kind.__module__
    own = home.startswith("torch.nn.modules.") and not home.endswith((".transformer", ".container"))
    return own and not module._modules


def is_of_torch(function: types.FunctionType) -> bool:
    """A Python function of torch's: nobody binds its name anew."""
    return function.__module__ in _FUNCTION_MODULES


def is_trusted_function(function: types.FunctionType) -> bool:
    """A Python function that need not be read."""
    return is_of_torch(function) or function.__module__.split(".")[0] == "einops"


def is_trusted_method(name: str) -> bool:
    """A method, by its name, of whatever value: a tensor's, or that of a list or a dict."""
    return (hasattr(torch.Tensor, name) and name not in _LEAKS) or name in _CONTAINER_METHODS


def is_trusted_callable(found: Any, call: ast.Call) -> bool:
    """A builtin, a type, or a method of `Tensor`, as it is called here."""
    home = str(getattr(found, "__module__", None) or "")
    if isinstance(found, types.BuiltinFunctionType):
        name = str(getattr(found, "__name__", ""))
        if found is getattr(builtins, name, None):
            if name in _BUILTINS or (name in ("max", "min") and _with_number(call)):
                return True
        elif home.split(".")[0] in ("torch", "math") or found in _torch_builtins():
            return True
    if isinstance(found, type) and (found.__name__ in _BUILTINS or _is_context(found)):
        return True
    return isinstance(found, type(torch.Tensor.relu))  # a method of Tensor, as torch.Tensor.relu


def _with_number(call: ast.Call) -> bool:
    """`max(a, 0)` computes a size; `max(a, b)` may choose between tensors."""
    return any(isinstance(a, ast.Constant) for a in call.args)


def _is_context(found: type) -> bool:
    contexts = ("torch.autograd.grad_mode", "torch.amp")
    return found.__module__.startswith(contexts) or found is torch.Size


@lru_cache(maxsize=1)
def _torch_builtins() -> frozenset[Any]:
    places = (torch, torch._C._nn, torch.special, torch.fft, torch.linalg)
    found = [getattr(p, n, None) for p in places for n in dir(p)]
    return frozenset(f for f in found if isinstance(f, types.BuiltinFunctionType))
