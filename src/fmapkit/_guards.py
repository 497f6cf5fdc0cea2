"""What a proof rests on: values that were read when it was made, compared before each pass."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["SIMPLE", "Evidence", "Guard", "is_plain"]

# Types whose values cannot change under us.
SIMPLE = (type(None), bool, int, float, str, torch.dtype, torch.device)


@dataclass(frozen=True, slots=True)
class Guard:
    """A plain value, or a function, the road was learned under."""

    module: Any  # a module or a class; or a dict: a function's globals, an instance's attributes
    path: str
    none_only: bool

    def value(self) -> Any:
        """The value now; a changed one asks for a plan of its own."""
        if isinstance(self.module, dict):
            return _Same(self.module.get(self.path))
        try:
            found = operator.attrgetter(self.path)(self.module)
        except AttributeError:
            return AttributeError
        if self.none_only:
            return found is None
        return _frozen(found)

    def place(self) -> tuple[dict[str, Any], str] | None:
        """The dict and key it reads, where the identity of what is there tells all."""
        if isinstance(self.module, dict):
            return self.module, self.path
        own = self.module.__dict__
        return (own, self.path) if isinstance(own.get(self.path), SIMPLE) else None


class _Same:
    """Equal to itself alone, whatever the value's own idea of equality; keeps it alive."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def _frozen(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(v) for v in value)
    return value if isinstance(value, SIMPLE) else _Same(value)


def is_plain(value: Any) -> bool:
    """Whether it is of simple values only."""
    if isinstance(value, (list, tuple)):
        return all(is_plain(v) for v in value)
    return isinstance(value, SIMPLE)


class Evidence:
    """What was looked at to prove one module.

    Attributes:
        module: whose forward is read.
        guards: the values that were read.
        deep: more than the module's own attributes was looked at.
    """

    __slots__ = ("deep", "guards", "module")

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.guards: list[Guard] = []
        self.deep = False

    def add(self, place: Any, path: str, none_only: bool = False) -> None:
        """The proof rests on this value."""
        self.guards.append(Guard(place, path, none_only))
