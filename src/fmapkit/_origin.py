"""What a tensor of a pass carries: filters of an `Origin`, as a `Flow`, or a parameter's values.

Data only. `_flow.py` says what each torch function makes of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fmapkit._axes import Axes

__all__ = ["NOWHERE", "STOP", "Flow", "Lookup", "Origin", "Tag", "Weight", "flow_of"]


class Origin:
    """Where filters come from: one call of a layer, of a norm, or nothing that has filters.

    Compared by identity: two calls are two origins.
    """

    __slots__ = ("call", "claimed", "kind", "name")

    def __init__(self, kind: str, name: str = "", call: int = 0) -> None:
        self.kind = kind  # "layer", "norm" or "none"
        self.name = name
        self.call = call
        self.claimed = False  # a nonlinearity has received these filters

    def __repr__(self) -> str:
        return f"<{self.kind} {self.name}#{self.call}>"


NOWHERE = Origin("none")


@dataclass(frozen=True, slots=True)
class Flow:
    """What a tensor carries: filters of `origin`, lying along `axes`."""

    origin: Origin
    axes: Axes | None = None


STOP = Flow(NOWHERE)


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter, or a tensor computed from parameters only.

    `axes` follows the parameter's first axis: which of its rows a slice of it has.
    """

    parameter: Tensor
    axes: Axes | None = None


Tag = Flow | Weight | None
Lookup = Callable[[Any], Tag]


def flow_of(tag: Lookup, value: Any) -> Flow | None:
    """What a value carries, if that is a flow."""
    found = tag(value)
    return found if isinstance(found, Flow) else None
