"""One call of a torch function that has run: what every rule is asked about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(slots=True)
class FunctionCall:
    """A call of a torch function."""

    name: str  # as `Function.name` has it
    function: Any
    args: Sequence[Any]
    kwargs: dict[str, Any]
    out: Any
    operands: list[Tensor]

    def argument(self, place: int, *names: str) -> Any:
        """An argument, by one of its names or by its place; None where it is not given."""
        return argument(self.args, self.kwargs, place, *names)


def argument(args: Sequence[Any], kwargs: dict[str, Any], place: int, *names: str) -> Any:
    """The same of a call that has not run."""
    for name in names:
        if name in kwargs:
            return kwargs[name]
    return args[place] if len(args) > place else None
