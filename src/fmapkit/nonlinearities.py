"""What counts as a nonlinearity σ: module types and functions, and the names they go by.

A module type listed here is one σ whatever it does inside. A function is found under each of
its faces (`torch.relu`, `Tensor.relu_`, `F.relu`, `torch.nn.functional.relu_`, …). Activation
modules written out by hand need no entry: `tracing/tracer.py` recognises them by what they do.

Functions that are one in some of their calls only (`clamp(min=0)`, `where(z > 0, …)`) are in
`provenance/conditional_sigma.py`. Softmax is none by default: it normalises over a group of values
and is not pointwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmapkit.errors import ArgumentError
from fmapkit.torchlib.operators import NATIVE, native

__all__ = ["register_nonlinearity"]

# Each goes by its own name in lower case, but for one.
MODULES: dict[type[nn.Module], str] = {
    getattr(nn, name): name.lower()
    for name in (
        *("CELU", "ELU", "GELU", "GLU", "Hardshrink", "Hardsigmoid", "Hardswish", "Hardtanh"),
        *("LogSigmoid", "Mish", "PReLU", "RReLU", "ReLU", "ReLU6", "SELU", "SiLU", "Sigmoid"),
        *("Softplus", "Softshrink", "Softsign", "Tanh", "Tanhshrink", "Threshold"),
    )
} | {nn.LeakyReLU: "leaky_relu"}

_TORCHS = set(MODULES)

# Other names that torch has for a function, beside those of `torch.special`.
_ALIASES = {
    "absolute": "abs",
    **{f"arc{name}": f"a{name}" for name in ("cos", "cosh", "sin", "sinh", "tan", "tanh")},
    "clip": "clamp",
    "divide": "div",
    "expit": "sigmoid",
    "fix": "trunc",
    "gammaln": "lgamma",
    "multigammaln": "mvlgamma",
    "multiply": "mul",
    "negative": "neg",
    "psi": "digamma",
    "subtract": "sub",
    "true_divide": "div",
}
_OPS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)
_PLACES = (torch, Tensor, F, NATIVE[0], torch.special, NATIVE[1])


def _with_these_names(names: Iterable[str]) -> set[Any]:
    found = (getattr(place, name, None) for name in names for place in _PLACES)
    return {function for function in found if callable(function)}


def _plain(name: str) -> str:
    """A function's one name, for all that do the same: methods, in-place forms and aliases."""
    name = name.partition(".")[0]
    if name.startswith("__") and name.endswith("__"):  # an operator: `z ** 2`, `abs(z)`
        name = name[2:-2]
    name = name.removesuffix("_").removeprefix("special_")
    return _ALIASES.get(name, name)


def _names_of(plain: str) -> list[str]:
    every = [plain, *(alias for alias, name in _ALIASES.items() if name == plain)]
    return [form for name in every for form in (name, f"{name}_", f"__{name}__", f"__i{name}__")]


# σ by the plain name of its function, which is σ's own but for two.
_BY_NAME = {
    name: name
    for name in (
        *("celu", "elu", "gelu", "glu", "hardshrink", "hardsigmoid", "hardswish", "hardtanh"),
        *("leaky_relu", "logsigmoid", "mish", "prelu", "relu", "relu6", "rrelu", "selu", "sigmoid"),
        *("silu", "softplus", "softshrink", "softsign", "tanh", "tanhshrink", "threshold"),
    )
} | {"log_sigmoid": "logsigmoid", "_prelu_kernel": "prelu"}


def function_sigma(function: Any) -> str | None:
    """The name of σ if a function is one, under any of its faces.

    Those in `torch.ops.aten` are made on first use, so they are known by name and namespace.
    """
    if isinstance(function, _OPS):
        function = _packet(function)
        if _space(function) in ("aten", "quantized"):
            return _BY_NAME.get(_plain(function.__name__))
    return FUNCTIONS.get(function)


def _packet(function: Any) -> Any:
    """All overloads of one of `torch.ops`."""
    return getattr(function, "overloadpacket", function)


def _space(function: Any) -> str:
    """The namespace of one of `torch.ops`."""
    space: str = _packet(function)._qualified_op_name.partition("::")[0]
    return space


def _same(function: Any) -> set[Any]:
    """A torch function with all that do the same; nothing if it is none that can be seen."""
    if isinstance(function, _OPS) and _space(function) != "aten":
        return {_packet(function)}
    if isinstance(function, _OPS) or (callable(function) and _is_torchs(function)):
        return {function} | _with_these_names(_names_of(_plain(function.__name__)))
    return set()


FUNCTIONS: dict[Any, str] = {
    function: sigma
    for name, sigma in _BY_NAME.items()
    for function in _with_these_names(_names_of(name))
}
_OWN = dict(FUNCTIONS)  # torch's, as it came

# Bumped by every registration, so that plans made before it are made anew.
version = 0


def register_nonlinearity(
    nonlinearity: type[nn.Module] | Callable[..., Any], name: str | None = None
) -> None:
    """Count a module type, or a function seen by `__torch_function__`, as one nonlinearity.

    Args:
        nonlinearity: an `nn.Module` subclass (its first tensor argument is z, its output a), or
            a torch function taking z first. With a function come its method, its in-place form
            and its other names (`torch.special.expit` is `Tensor.sigmoid_`), in all their calls. A
            plain Python function that torch does not dispatch on cannot be seen from outside: wrap
            it in a module.
        name: what `FeatureMap.nonlinearity` says; by default its own name in lower case.

    Raises:
        ArgumentError: it is neither, or a plain Python function.
    """
    global version
    if isinstance(nonlinearity, type) and issubclass(nonlinearity, nn.Module):
        MODULES[nonlinearity] = name or nonlinearity.__name__.lower()
        _TORCHS.discard(nonlinearity)
    elif functions := _same(nonlinearity):
        plain = _plain(nonlinearity.__name__)
        sigma = name or plain
        FUNCTIONS.update(dict.fromkeys(functions, sigma))
        if not isinstance(nonlinearity, _OPS) or _space(nonlinearity) == "aten":
            _BY_NAME[plain] = sigma
    else:
        raise ArgumentError(
            "register_nonlinearity takes an nn.Module subclass or a torch function, "
            f"not {nonlinearity!r}; wrap a function of your own in an nn.Module"
        )
    version += 1


def module_sigma(module: nn.Module) -> str | None:
    """The name of σ if the module's type, or the nearest base of it, is registered.

    One of torch's is that only as long as torch's own forward runs.
    """
    return class_sigma(type(module), runs_torchs_forward(module))


def class_sigma(kind: type[nn.Module], as_torch_has_it: bool) -> str | None:
    """The same of all modules of a class.

    Args:
        as_torch_has_it: torch's own forward runs (see `runs_torchs_forward`).
    """
    base = next((base for base in kind.__mro__ if base in MODULES), None)
    if base is None or (base in _TORCHS and not as_torch_has_it):
        return None
    return MODULES[base]


def runs_torchs_forward(module: nn.Module) -> bool:
    """Whether nobody has put another forward in the place of torch's, in a subclass or by hand."""
    return is_torchs_forward(module.__dict__.get("forward", type(module).forward))


def is_torchs_forward(forward: Any) -> bool:
    """Whether a forward is one that torch has written."""
    return str(getattr(forward, "__module__", "")).startswith("torch.nn.modules.")


def is_torchs(module: nn.Module) -> bool:
    """Whether it is one of torch's own modules, and runs as torch has written it."""
    return type(module).__module__.startswith("torch.nn.modules.") and runs_torchs_forward(module)


def runs_as(module: nn.Module) -> str | None:
    """The σ of the function that torch's own module calls; None of what users have registered."""
    base = next((base for base in type(module).__mro__ if base in MODULES), None)
    if base is None or base not in _TORCHS:
        return None
    return "hardtanh" if base is nn.ReLU6 else MODULES[base]


def is_call_of(module: nn.Module, function: Any) -> bool:
    """Whether a function is what a module that is a registered σ calls; any is of a user's."""
    expected = runs_as(module)
    return expected is None or _OWN.get(function) == expected


def patched_name(module: nn.Module) -> str:
    """What stands in torch's namespaces in the place of the function that its own module calls."""
    expected = runs_as(module)
    for place in (F, torch):
        function = getattr(place, expected or "", None)
        if callable(function) and _OWN.get(function) != expected:
            return str(getattr(function, "__name__", type(function).__name__))
    return type(module).__name__


def _is_torchs(function: Any) -> bool:
    """Whether torch hands a function's calls to modes; `torch.cos_` it keeps in no list."""
    seen = torch.overrides.get_overridable_functions().values()
    name = getattr(function, "__name__", "")
    return any(function in functions for functions in seen) or native(name) is function
