"""Units: which modules are replayed as a whole, and what tells their calls apart.

A unit is the outermost proven module on its branch. Two calls of it are of one kind if their
arguments have the same form and carry the same, and nothing has changed that its road depends on
(its guards, `inplace` flags, dtypes of weights, modes). Each kind has a plan of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from fmapkit._form import form_of, weights_of
from fmapkit._guards import Guard
from fmapkit._origin import Flow, Weight
from fmapkit._plan import Plan
from fmapkit._proof import Proofs
from fmapkit._trace import Tracer
from fmapkit._transforms import under_transform

__all__ = ["Unit", "Units", "carried", "numbers_in", "shape_of"]


_GONE = object()
_MOST_PLANS = 64


class Unit:
    """One unit: what its road depends on, and its plans.

    Attributes:
        plans: by the kind of call, and the unit's state.
        form: tells dtype and layout of its weights.
        numbers: those that it is given tell its calls apart.
    """

    __slots__ = (
        *("_flags", "_guards", "_held", "_keys", "_latest", "_slow", "_values"),
        *("form", "numbers", "plans"),
    )

    def __init__(self, module: nn.Module, guards: list[Guard], numbers: bool = False) -> None:
        self.plans: dict[Any, Plan] = {}
        self.numbers = numbers
        self.form = weights_of(module)
        self._guards = guards
        self._flags = [m.__dict__ for m in module.modules() if "inplace" in m.__dict__]
        # Of the latest call: what dicts hold is compared by identity, before all the rest.
        self._held: list[Mapping[str, Any]] = []
        self._keys: list[str] = []
        self._values: list[Any] = []
        self._slow: list[Guard] = []
        self._latest: tuple[Plan, Any, list[Any]] | None = None

    @property
    def depends(self) -> bool:
        """Whether its road depends on anything but what it is given."""
        return bool(self._guards or self._flags)

    def learned(self, kind: Any, plan: Plan) -> None:
        """The plan for a kind of call; where ever new numbers come, not for all of them."""
        if len(self.plans) >= _MOST_PLANS:
            self.plans.clear()
        self.plans[kind] = plan

    def state(self) -> Any:
        """The values its road depends on."""
        return tuple([g.value() for g in self._guards]), tuple([d["inplace"] for d in self._flags])

    def same(self, shape: Any) -> Plan | None:
        """The plan of the latest call, if this one is alike in all that the road depends on."""
        if self._latest is None:
            return None
        plan, last, slow = self._latest
        if shape != last:
            return None
        for held, key, value in zip(self._held, self._keys, self._values, strict=True):
            if held.get(key, _GONE) is not value:
                return None
        return plan if not slow or [g.value() for g in self._slow] == slow else None

    def remember(self, plan: Plan, shape: Any) -> None:
        """This call's plan, for `same`."""
        places = [g.place() for g in self._guards]
        self._slow = [g for g, p in zip(self._guards, places, strict=True) if p is None]
        at_once = [p for p in places if p is not None] + [(d, "inplace") for d in self._flags]
        self._held = [held for held, _ in at_once]
        self._keys = [key for _, key in at_once]
        self._values = [held.get(key, _GONE) for held, key in at_once]
        # A list that took the place of a plain value may change and still be the same object.
        if any(isinstance(v, (list, dict, set)) for v in self._values):
            self._latest = None
        else:
            self._latest = (plan, shape, [g.value() for g in self._slow])


class Units:
    """The units of one model.

    Args:
        is_ours: tells hooks of this capture, which a proof leaves out, from others.

    Attributes:
        direct: modules that a scope has called itself.
    """

    def __init__(self, is_ours: Callable[[Any], bool]) -> None:
        self.direct: set[nn.Module] = set()
        self._is_ours = is_ours
        self._opened: set[nn.Module] = set()  # proven, but with something to edit in them
        self._proven: dict[nn.Module, bool] = {}
        self._known: dict[nn.Module, Unit] = {}
        self._proofs = Proofs(is_ours)

    def proven(self, module: nn.Module) -> bool:
        """Whether a module may be replayed as a whole."""
        found = self._proven.get(module)
        if found is None:
            found = module not in self._opened and self._proofs.proven(module)
            self._proven[module] = found
        return found

    def stands_alone(self, module: nn.Module, args: Any, tracer: Tracer | None) -> bool:
        """Whether this call is a unit: not inside a module that may be one σ or layer itself."""
        if not self.proven(module) or under_transform(module, args):
            return False
        if tracer is not None and module in tracer.leaves:
            return False
        return tracer is None or all(f.kind == "plain" for f in tracer.frames)

    def of(self, module: nn.Module) -> Unit:
        """The unit that a proven module is."""
        found = self._known.get(module)
        if found is None:
            guards, numbers = self._proofs.guards(module), self._proofs.numbers(module)
            found = self._known[module] = Unit(module, guards, numbers)
        return found

    def forget(self, module: nn.Module) -> None:
        """It left the road it was proven to take: learn it anew."""
        self._known.pop(module, None)

    def open(self, module: nn.Module) -> None:
        """From the next pass on, only the parts of it are units."""
        self._opened.add(module)
        self._proven.pop(module, None)
        self.direct.discard(module)

    def clear(self) -> None:
        """The model has other modules than it had, or the block has ended."""
        self.direct.clear()
        self._opened.clear()
        self._proven.clear()
        self._known.clear()
        self._proofs = Proofs(self._is_ours)


def shape_of(value: Any) -> Any:
    """What kind of arguments these are: form of tensors, types of the rest, by place."""
    if type(value) is Tensor:
        return form_of(value)
    if isinstance(value, nn.Parameter):  # whose it is says whose the maps are
        return form_of(value), type(value), id(value)
    if isinstance(value, Tensor):
        return form_of(value), type(value)
    if isinstance(value, (tuple, list)):
        return tuple([shape_of(v) for v in value])
    if isinstance(value, dict):
        return tuple([(k, shape_of(v)) for k, v in value.items()]) if value else ()
    return type(value)


def numbers_in(*values: Any) -> tuple[int, ...]:
    """Every whole number in nested arguments, in order."""
    found: list[int] = []
    for value in values:
        if isinstance(value, int):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += numbers_in(*value)
        elif isinstance(value, dict):
            found += numbers_in(*value.values())
    return tuple(found)


def carried(inputs: list[Any], asked: Callable[[str], Any]) -> Any:
    """What the inputs carry, origins numbered in order of their first mention.

    Args:
        inputs: the tags of all tensors that come in.
        asked: what was asked for of a layer: which of its maps are held may differ from another's.
    """
    origins: list[int] = []
    found: list[Any] = []
    for tag in inputs:
        if isinstance(tag, Flow):
            if id(tag.origin) not in origins:
                origins.append(id(tag.origin))
            place = origins.index(id(tag.origin))
            found.append((tag.origin.kind, tag.axes, place, asked(tag.origin.name)))
        else:
            found.append("weight" if isinstance(tag, Weight) else None)
    return tuple(found)
