"""Tensors in nested arguments and outputs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["leaves", "tensors_in"]


def tensors_in(*values: Any) -> list[Tensor]:
    """Every tensor in nested tuples, lists and dicts, in order."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            if value:
                found += tensors_in(*value)
        elif isinstance(value, dict) and value:
            found += tensors_in(*value.values())
    return found


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
