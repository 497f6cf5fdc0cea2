"""What counts as a nonlinearity σ: module types and functions, and the names they go by.

A module type listed here is one σ whatever it does inside. A function is found under each of
its faces (`torch.relu`, `Tensor.relu_`, `F.relu`, `torch.nn.functional.relu_`, …). Activation
modules written out by hand need no entry: `_trace.py` recognises them by what they do.

Softmax is none by default: it normalises over a group of values and is not pointwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fmapkit.errors import ArgumentError

__all__ = ["register_nonlinearity"]

MODULES: dict[type[nn.Module], str] = {
    nn.CELU: "celu",
    nn.ELU: "elu",
    nn.GELU: "gelu",
    nn.GLU: "glu",
    nn.Hardshrink: "hardshrink",
    nn.Hardsigmoid: "hardsigmoid",
    nn.Hardswish: "hardswish",
    nn.Hardtanh: "hardtanh",
    nn.LeakyReLU: "leaky_relu",
    nn.LogSigmoid: "logsigmoid",
    nn.Mish: "mish",
    nn.PReLU: "prelu",
    nn.RReLU: "rrelu",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SELU: "selu",
    nn.SiLU: "silu",
    nn.Sigmoid: "sigmoid",
    nn.Softplus: "softplus",
    nn.Softshrink: "softshrink",
    nn.Softsign: "softsign",
    nn.Tanh: "tanh",
    nn.Tanhshrink: "tanhshrink",
    nn.Threshold: "threshold",
}

# The name of σ, and the names under which torch has it (an in-place form ends in "_").
_NAMES: dict[str, tuple[str, ...]] = {
    name: (name, name + "_")
    for name in (
        *("celu", "elu", "hardtanh", "leaky_relu", "relu", "relu6", "rrelu", "selu", "sigmoid"),
        *("tanh", "threshold", "silu", "mish", "hardswish", "hardsigmoid"),
    )
} | {
    "gelu": ("gelu",),
    "glu": ("glu",),
    "hardshrink": ("hardshrink",),
    "logsigmoid": ("logsigmoid", "log_sigmoid"),
    "prelu": ("prelu", "_prelu_kernel"),
    "sigmoid": ("sigmoid", "sigmoid_", "expit"),
    "softplus": ("softplus",),
    "softshrink": ("softshrink",),
    "softsign": ("softsign",),
    "tanhshrink": ("tanhshrink",),
}


def _faces() -> dict[Any, str]:
    places = (torch, torch.Tensor, F, torch._C._nn, torch.special, torch._C._VariableFunctions)
    found: dict[Any, str] = {}
    for sigma, names in _NAMES.items():
        for name in names:
            for place in places:
                function = getattr(place, name, None)
                if callable(function):
                    found[function] = sigma
    return found


_BY_NAME = {name: sigma for sigma, names in _NAMES.items() for name in names}


def function_sigma(function: Any) -> str | None:
    """The name of σ if a function is one, under any of its faces.

    Those in `torch.ops.aten` are made on first use, so they are known by name and namespace.
    """
    if isinstance(function, torch._ops.OpOverload):
        function = function.overloadpacket
    if isinstance(function, torch._ops.OpOverloadPacket):
        space, _, name = function._qualified_op_name.partition("::")
        return _BY_NAME.get(name) if space == "aten" else FUNCTIONS.get(function)
    return FUNCTIONS.get(function)


FUNCTIONS: dict[Any, str] = _faces()

# Bumped by every registration, so that plans made before it are made anew.
version = 0


def register_nonlinearity(
    nonlinearity: type[nn.Module] | Callable[..., Any], name: str | None = None
) -> None:
    """Count a module type, or a function seen by `__torch_function__`, as one nonlinearity.

    Args:
        nonlinearity: an `nn.Module` subclass (its first tensor argument is z, its output a), or
            a torch function taking z first. A plain Python function that torch does not dispatch
            on cannot be seen from outside: wrap it in a module.
        name: what `FeatureMap.nonlinearity` says; by default its own name in lower case.

    Raises:
        ArgumentError: it is neither, or a plain Python function.
    """
    global version
    if isinstance(nonlinearity, type) and issubclass(nonlinearity, nn.Module):
        MODULES[nonlinearity] = name or nonlinearity.__name__.lower()
    elif nonlinearity in _overridable():
        FUNCTIONS[nonlinearity] = name or str(getattr(nonlinearity, "__name__", "?"))
    else:
        raise ArgumentError(
            "register_nonlinearity takes an nn.Module subclass or a torch function, "
            f"not {nonlinearity!r}; wrap a function of your own in an nn.Module"
        )
    version += 1


def module_sigma(module: nn.Module) -> str | None:
    """The name of σ if the module's type, or the nearest base of it, is registered."""
    for base in type(module).__mro__:
        if base in MODULES:
            return MODULES[base]
    return None


def _overridable() -> set[Any]:
    by_place = torch.overrides.get_overridable_functions()
    return {function for functions in by_place.values() for function in functions}
