"""What counts as a layer: module types with filters, and the axis of their output that counts them.

Functional weights need no entry: `provenance/layer_ops.py` finds the weight of a convolution or a
product, and the tracer its owner. `register_layer` is for modules whose weighting torch does not
show, such as a layer around a custom kernel.
"""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from typing import Any

from torch import nn

from fmapkit.errors import ArgumentError, is_int
from fmapkit.torchlib.caching import remembered

__all__ = ["register_layer"]

# Type -> axis of the filters in its output. Convolutions: the axis before the spatial ones, which
# is 1, or 0 when unbatched; counted from the end it is the same for both.
MODULES: dict[type[nn.Module], int] = {nn.Bilinear: -1}
_homes: list[Any] = [nn]
with suppress(ImportError):  # torch is to give its quantised modules up one day
    _homes.append(import_module("torch.ao.nn.quantized"))
for _home in _homes:
    MODULES[_home.Linear] = -1
    for _dim in (1, 2, 3):
        MODULES[getattr(_home, f"Conv{_dim}d")] = -1 - _dim
        MODULES[getattr(_home, f"ConvTranspose{_dim}d")] = -1 - _dim

# Types registered by users: opaque, their output is the response whatever runs inside.
REGISTERED: dict[type[nn.Module], int] = {}

version = 0


def register_layer(module_type: type[nn.Module], filter_axis: int) -> None:
    """Count a module type as one layer; what it returns is its response.

    Args:
        module_type: an `nn.Module` subclass that returns one tensor.
        filter_axis: the axis of that tensor along which its filters lie.

    Raises:
        ArgumentError: `module_type` is no `nn.Module` subclass or the axis is no int.
    """
    global version
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise ArgumentError(f"register_layer takes an nn.Module subclass, not {module_type!r}")
    if not is_int(filter_axis):
        raise ArgumentError(f"filter_axis must be an int, not {filter_axis!r}")
    REGISTERED[module_type] = filter_axis
    version += 1


def layer_axis(module: nn.Module) -> int | None:
    """The filter axis if the module's type, or a base of it, is a layer."""
    return _axis_of(type(module), version)


@remembered
def _axis_of(kind: type, registered: int) -> int | None:
    for base in kind.__mro__:
        if base in REGISTERED:
            return REGISTERED[base]
        if base in MODULES:
            return MODULES[base]
    return None


def is_registered(module: nn.Module) -> bool:
    """Whether a user registered its type (or a base), so that it is one opaque layer."""
    return any(base in REGISTERED for base in type(module).__mro__)


def filter_count(module: nn.Module) -> int | None:
    """Number of filters of a layer of torch's own types, read off its attributes."""
    for name in ("out_channels", "out_features"):
        count = getattr(module, name, None)
        if isinstance(count, int):
            return count
    return None
