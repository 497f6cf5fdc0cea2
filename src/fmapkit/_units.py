"""Units: which modules are replayed as a whole, and what tells their calls apart.

A unit is the outermost module on its branch whose decisions, and those of all modules in it, are
recorded and do not come from data. Two calls of it are of one kind if their arguments have the same
form and carry the same, and nothing has changed that no path tells: attributes of torch's own
modules, dtypes of weights, modes. Each kind has paths of its own, and a plan for each of these.
"""

from __future__ import annotations

import operator
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fmapkit._form import form_of, weights_of
from fmapkit._fused import fuses
from fmapkit._hooks import hooks_on
from fmapkit._optimized import is_compiled
from fmapkit._origin import Flow, Weight
from fmapkit._plan import Plan, alike
from fmapkit._stop import has_own_forward
from fmapkit._trace import Tracer
from fmapkit._transforms import under_transform
from fmapkit.paths import KnownPaths, Sizes

__all__ = ["Unit", "Units", "carried", "shape_of", "sizes_of"]


_MOST_KINDS = 64
# How many calls of a unit may take a new path before those of its parts that differ are traced.
_MOST_DEPARTURES = 2
_TOLD = frozenset({bool, str, type(None), torch.dtype, torch.device})
_PLAIN = (bool, int, float, str, type(None), tuple, torch.dtype, types.FunctionType, type)


class Unit:
    """One unit.

    Attributes:
        known: the paths of each kind of call.
        form: tells dtype and layout of its weights.
    """

    __slots__ = ("_looked_at", "_states", "_values", "form", "known")

    def __init__(self, module: nn.Module) -> None:
        self.known: dict[Any, KnownPaths[Plan]] = {}
        self.form = weights_of(module)
        self._looked_at = [
            (operator.itemgetter(*names), m.__dict__)
            for m in module.modules()
            if (names := _plain_attributes(m))
        ]
        self._values = [get(there) for get, there in self._looked_at]
        self._states: list[list[Any]] = [self._values]

    def paths(self, kind: Any) -> KnownPaths[Plan]:
        """Those of a kind of call."""
        found = self.known.get(kind)
        if found is None:
            if len(self.known) >= _MOST_KINDS:
                self.known.clear()
            found = self.known[kind] = KnownPaths(alike)
        return found

    def state(self) -> int:
        """Which of the states it has been in: attributes that torch's own code decides by."""
        try:
            now = [get(there) for get, there in self._looked_at]
        except KeyError:  # one was deleted
            return -1
        if now == self._values:
            return 0
        if now not in self._states:
            self._states.append(now)
        return self._states.index(now)


def _plain_attributes(module: nn.Module) -> list[str]:
    """What a module has that torch's own code may decide by; other code tells what it reads."""
    home = getattr(type(module).forward, "__module__", None) or ""
    if not home.startswith("torch."):
        return []
    return [k for k, v in module.__dict__.items() if k[:1] != "_" and isinstance(v, _PLAIN)]


class Units:
    """The units of one model.

    Args:
        is_ours: tells hooks of this capture from others.

    Attributes:
        direct: modules that a scope has called itself.
    """

    def __init__(self, is_ours: Callable[[Any], bool]) -> None:
        self.direct: set[nn.Module] = set()
        self._is_ours = is_ours
        self._opened: set[nn.Module] = set()
        self._static: dict[nn.Module, bool] = {}
        self._known: dict[nn.Module, Unit] = {}

    def static(self, module: nn.Module) -> bool:
        """Whether a module may be replayed as a whole: nothing in it has to be traced each time."""
        found = self._static.get(module)
        if found is None:
            self._static[module] = False  # a module inside itself
            found = self._own(module) and all(map(self.static, module.children()))
            self._static[module] = found
        return found

    def _own(self, module: nn.Module) -> bool:
        """The same of its own code."""
        if module in self._opened or has_own_forward(module) or is_compiled(module):
            return False
        if fuses(module):
            return False
        if type(module).__call__ is not nn.Module.__call__:
            return False
        if isinstance(module, torch.jit.ScriptModule):
            return False
        return all(map(self._is_ours, hooks_on(module)))

    def stands_alone(self, module: nn.Module, args: Any, tracer: Tracer | None) -> bool:
        """Whether this call is a unit: not inside a module that may be one σ or layer itself."""
        if not self.static(module) or under_transform(module, args):
            return False
        return tracer is None or all(f.kind == "plain" for f in tracer.frames)

    def of(self, module: nn.Module) -> Unit:
        """The unit that a module is."""
        found = self._known.get(module)
        if found is None:
            found = self._known[module] = Unit(module)
        return found

    def open(self, *modules: nn.Module) -> None:
        """From the next pass on, these are traced in every pass, and the parts of them are units."""
        self._opened.update(modules)
        self._static.clear()
        for module in modules:
            self._known.pop(module, None)
            self.direct.discard(module)

    def clear(self) -> None:
        """The model has other modules than it had, or the block has ended."""
        self.direct.clear()
        self._opened.clear()
        self._static.clear()
        self._known.clear()


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
    return value if type(value) in _TOLD else type(value)


def sizes_of(tensors: list[Tensor], args: Any, kwargs: Any) -> Sizes:
    """The sizes of tensors, one after the other, and the whole numbers that a module is given."""
    sizes = [size for tensor in tensors for size in tensor.shape]
    _numbers_in(sizes, args)
    if kwargs:
        _numbers_in(sizes, kwargs)
    return tuple(sizes)


def _numbers_in(found: list[int], value: Any) -> None:
    if isinstance(value, int):
        found.append(value)
    elif isinstance(value, (tuple, list)):
        for inner in value:
            _numbers_in(found, inner)
    elif isinstance(value, dict):
        for inner in value.values():
            _numbers_in(found, inner)


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
