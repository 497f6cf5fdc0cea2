"""One operator of a pass, as a rule or the probe is given it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fmapkit.torchlib.operators import tree_leaves


@dataclass
class Call:
    """One operator that has run, for the rule of it.

    Attributes:
        name: of the operator, without namespace, overload and the mark of its in-place form.
        given: its arguments by name, with the values from before the call.
        fields: of those arguments that are tensors and no constants, by `id`.
        results: the tensors that it returned or wrote to.
        assumed: is told where all of an operand is taken to matter.
    """

    name: str
    function: Any
    given: dict[str, Any]
    fields: dict[int, Tensor]
    results: list[Tensor]
    assumed: Callable[[str], None]

    def of(self, value: Any) -> Tensor | None:
        return self.fields.get(id(value)) if isinstance(value, Tensor) else None

    @property
    def field(self) -> Tensor:
        """Of `self`, the one operand of the operator."""
        found = self.of(self.given["self"])
        assert found is not None
        return found

    def get(self, *names: str, default: Any = None) -> Any:
        """An argument, by the first of these names that the operator has."""
        for name in names:
            if name in self.given:
                return self.given[name]
        return default

    def run(self, given: dict[str, Any]) -> Any:
        """What the operator gives for some arguments by name."""
        there = [a for a in self.function._schema.arguments if a.name in given]
        return self.function(
            *[given[a.name] for a in there if not a.kwarg_only],
            **{a.name: given[a.name] for a in there if a.kwarg_only},
        )

    @property
    def operands(self) -> list[Tensor]:
        return [t for t in tree_leaves(self.given) if isinstance(t, Tensor)]


def written(function: Any, given: dict[str, Any]) -> list[Tensor]:
    """The operands, by name, that an operator writes to."""
    if not function._schema.is_mutable:
        return []
    arguments = function._schema.arguments
    names = [a.name for a in arguments if a.alias_info and a.alias_info.is_write]
    return tensors_of([given.get(name) for name in names])


def tensors_of(*values: Any) -> list[Tensor]:
    """Every tensor in some values, once."""
    found = [t for t in tree_leaves(values) if isinstance(t, Tensor)]
    return list({id(t): t for t in found}.values())


Rule = Callable[[Call], Sequence[Tensor | None]]


def named(rule: Rule, names: str) -> dict[str, Rule]:
    """The rule of some operators, by their names."""
    return dict.fromkeys(names.split(), rule)
