"""Tensors in nested arguments and outputs, and modules in modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["leaves", "modules_in", "tensors_in"]


# What most arguments are: `isinstance(value, Tensor)` asks a metaclass of all that is not a Tensor.
_TENSORS = frozenset({Tensor, nn.Parameter})
_OTHERS = frozenset(
    {type(None), bool, int, float, str, slice, torch.Size, torch.dtype, torch.device}
)


def tensors_in(*values: Any) -> list[Tensor]:
    """Every tensor in nested tuples, lists and dicts, in order."""
    found: list[Tensor] = []
    for value in values:
        kind = type(value)
        if kind in _TENSORS:
            found.append(value)
        elif kind in _OTHERS:
            continue
        elif isinstance(value, (tuple, list)):
            if not _OTHERS.issuperset(map(type, value)):
                found += tensors_in(*value)
        elif isinstance(value, dict):
            if value:
                found += tensors_in(*value.values())
        elif isinstance(value, Tensor):
            found.append(value)
    return found


def modules_in(module: nn.Module) -> list[nn.Module]:
    """What `module.modules()` gives: itself and all in it, each once, outermost first.

    That is a generator for each level, each of which hands on what those below it give.
    """
    found: dict[nn.Module, None] = {}
    _collect(module, found)
    return list(found)


def _collect(module: nn.Module, found: dict[nn.Module, None]) -> None:
    found[module] = None
    for child in module._modules.values():
        if child is not None and child not in found:
            if child._modules:
                _collect(child, found)
            else:
                found[child] = None


def leaves(value: Any, path: str = "") -> list[tuple[str, Tensor]]:
    """Each tensor of a nested output with its path: `[0]`, `['w']`, `.logits`."""
    if isinstance(value, Tensor):
        return [(path, value)]
    found: list[tuple[str, Tensor]] = []
    fields = getattr(type(value), "__dataclass_fields__", None)
    if fields is not None:
        for name in fields:
            found += leaves(getattr(value, name, None), f"{path}.{name}")
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        for name in value._fields:
            found += leaves(getattr(value, name), f"{path}.{name}")
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            found += leaves(item, f"{path}[{index}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            found += leaves(item, f"{path}[{key!r}]")
    return found
