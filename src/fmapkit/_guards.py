"""What a proof rests on: values that were read when it was made, compared before each pass."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from types import FunctionType
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

    def place(self) -> tuple[Mapping[str, Any], str] | None:
        """Where it reads, if the identity of what is there tells all.

        torch moves an attribute from one of these dicts to another when a parameter or a module
        takes the place of None: it is not there any more then.
        """
        if isinstance(self.module, dict):
            return self.module, self.path
        *owners, name = self.path.split(".")
        at = self.module
        for owner in owners:  # through modules only: the structure is compared as a whole
            at = getattr(at, "_modules", {}).get(owner)
        for place in ("__dict__", "_parameters", "_buffers"):
            held: Mapping[str, Any] = getattr(at, place, {})
            if name in held:
                return (held, name) if isinstance(held[name], (*SIMPLE, FunctionType)) else None
        return None


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
        numbers: whole numbers that it is given may pick filters, or axes.
    """

    __slots__ = ("deep", "guards", "module", "numbers")

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.guards: list[Guard] = []
        self.deep = self.numbers = False

    def add(self, place: Any, path: str, none_only: bool = False) -> None:
        """The proof rests on this value."""
        self.guards.append(Guard(place, path, none_only))
