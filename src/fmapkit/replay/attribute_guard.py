"""Plain attributes of modules, compared before each call of a region.

Torch's own code may decide by them, and it does not record: what is assigned to attributes that it
reads, while a pass runs, is recorded there (`OF_TORCHS`). All other code records what it reads; but
where an attribute is another one than before, it is better to know that beforehand.
"""

from __future__ import annotations

import enum
import functools
import itertools
import operator
import types
from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import nn

from fmapkit.replay.escapes import own_names
from fmapkit.torchlib.caching import DictWatch, remembered
from fmapkit.torchlib.nested import modules_in

_MOST_STATES = 64
_PLAIN = frozenset(
    {
        *(bool, int, float, str, type(None), tuple, torch.dtype, torch.device, type),
        *(types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial),
    }
)
_SIMPLE = _PLAIN - {tuple}
_ROWS = frozenset({list, torch.Size})  # of modules of torch's, which have sizes there
_NONE = object()


class AttributeGuard:
    """The states that the attributes of a module, and of all modules in it, have been in."""

    def __init__(self, module: nn.Module) -> None:
        self._modules = [m for m in modules_in(module) if not isinstance(m, torch.jit.ScriptModule)]
        self._count = itertools.count()
        self._look_at_all()

    def _look_at_all(self) -> None:
        """Compare all attributes that there are now."""
        self._names = self._there()
        self._look_at(self._names)

    def _there(self) -> dict[int, list[str]]:
        """What each module, told by its id, has that can be compared."""
        return {id(m): _plain_attributes(m) for m in self._modules}

    def _look_at(self, names: dict[int, list[str]], values: dict[int, Any] | None = None) -> None:
        """Compare these attributes of each module, told by its id, before each call.

        They had these values before the latest call; None: there was none, so those that they have.
        """
        # Modules with the same attributes lie together: those of a group are read in C.
        groups: dict[tuple[str, ...], list[nn.Module]] = {}
        for module in self._modules:
            if names[id(module)]:
                groups.setdefault(tuple(names[id(module)]), []).append(module)
        self._looked_at = [(m, keys) for keys, modules in groups.items() for m in modules]
        self._getters = [operator.itemgetter(*keys) for keys in groups]
        self._places = [[m.__dict__ for m in modules] for modules in groups.values()]
        self._dicts = DictWatch(chain.from_iterable(self._places))
        self._lengths = list(map(len, chain.from_iterable(self._places)))
        if values is None:
            self._values = list(map(_comparable, self._now()))
        else:
            self._values = [values[id(module)] for module, _ in self._looked_at]
        self._number = self._latest = next(self._count)  # that stands for these
        self._states = {self._number: self._values}

    def _now(self) -> list[Any]:
        """What the attributes are, module by module."""
        return list(chain.from_iterable(map(map, self._getters, self._places)))

    def state(self) -> int:
        """The number of the state that they are in. No number ever stands for another state."""
        if self._places and self._dicts.written():
            self._latest = self._state()
        return self._latest

    def _state(self) -> int:
        """The same, told by what the attributes are."""
        try:
            now = self._now()
        except KeyError:  # one was deleted
            self._look_at_all()
            return self._number
        lengths = list(map(len, chain.from_iterable(self._places)))
        if lengths != self._lengths:
            self._lengths = lengths
            if self._more():
                return self._number
        now = list(map(_comparable, now))  # of what is no plain value, no code of its own runs
        if now == self._values:
            return self._number
        for number, known in self._states.items():
            if now == known:
                return number
        if len(self._states) >= _MOST_STATES:
            self._states = {self._number: self._values}
        new = next(self._count)
        self._states[new] = now
        return new

    def _more(self) -> bool:
        """Look at attributes that came, as where one takes the place of its class's, too."""
        now = self._there()
        new = {at: [n for n in names if n not in self._names[at]] for at, names in now.items()}
        self._names = now
        if not any(new.values()):
            return False
        looked_at = {id(m): list(keys) for m, keys in self._looked_at}
        self._look_at({at: [*looked_at.get(at, ()), *names] for at, names in new.items()})
        return True

    def knows(self, number: int) -> bool:
        """Whether a number stands for a state that is remembered."""
        return number in self._states

    def differ_in_floats(self, one: int, other: int) -> bool:
        """Whether nothing but floats differs in two states, as where some are annealed."""
        changed = list(self._changes(one, other))
        return all(type(v) is float for _, pair in changed for v in pair) and not any(
            _is_torchs(module) for module, _ in changed
        )

    def tell(self, numbers: set[Any], one: int, other: int) -> bool:
        """Whether an attribute differs in two states as one of some numbers does: a pair."""
        return bool(numbers) and any(pair in numbers for _, pair in self._changes(one, other))

    def _changes(self, one: int, other: int) -> Iterator[tuple[nn.Module, tuple[Any, Any]]]:
        """The attributes that differ in two states: their modules, and what they are in each."""
        states = self._states[one], self._states[other]
        for (module, keys), old, new in zip(self._looked_at, *states, strict=True):
            if old != new:
                pairs = zip(old, new, strict=True) if len(keys) > 1 else [(old, new)]
                yield from ((module, pair) for pair in pairs if pair[0] != pair[1])

    def may_look_less(self, one: int, other: int) -> bool:
        """Whether anything differs in two states that torch's own code does not decide by."""
        return not all(_is_torchs(module) for module, _ in self._changes(one, other))

    def look_less(self, one: int, other: int) -> int:
        """Compare no more what differs in two states in which the same path was taken.

        Attributes that torch's own code may decide by are compared all the same. Returns the number
        that stands for both from now on; none that was given before holds.
        """
        names: dict[int, list[str]] = {id(m): [] for m in self._modules}
        values: dict[int, Any] = {}
        states = self._states[one], self._states[other]
        for (module, keys), old, new in zip(self._looked_at, *states, strict=True):
            pairs = zip(keys, old, new, strict=True) if len(keys) > 1 else [(keys[0], old, new)]
            kept = {k: b for k, a, b in pairs if a == b or _is_torchs(module)}
            names[id(module)] = list(kept)
            if kept:
                values[id(module)] = tuple(kept.values()) if len(kept) > 1 else kept.popitem()[1]
        self._look_at(names, values)
        return self._number


def calls_torchs(items: list[Any]) -> bool:
    """Whether code of the model's calls a forward of torch's itself, past the module.

    That decides by the module's attributes. Of torch's functions alone, a path has them themselves.
    """
    return any(type(item) is types.FunctionType and item.__name__ == "forward" for item in items)


def _comparable(value: Any) -> Any:
    """The same, with the type of whatever is not to be compared, or kept alive, in its place."""
    kind = type(value)
    if kind in _ROWS:
        return kind, *map(_comparable, value)
    if kind is tuple:
        return value if _SIMPLE.issuperset(map(type, value)) else tuple(map(_comparable, value))
    return value if kind in _PLAIN else kind


def _is_torchs(module: nn.Module) -> bool:
    """Whether torch's own code may decide by a module's attributes.

    So it is of classes derived of torch's, too: their forward may call the one that they replace.
    """
    bases = (base for base in type(module).__mro__ if base is not nn.Module)
    return any(_runs_torchs(vars(base).get("forward")) for base in bases)


def _runs_torchs(forward: Any) -> bool:
    return type(forward) is types.FunctionType and str(forward.__module__).startswith("torch.")


# Modules of torch's that make the same calls whatever their attributes are, but for the mode, and
# whose results are as many, with the filters where they were.
_STEADY = (
    *(nn.Linear, nn.Identity, nn.Embedding, nn.LayerNorm, nn.GroupNorm),
    *(nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase),
    *(nn.modules.pooling._AvgPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd),
)


@remembered
def _is_steady(kind: type[nn.Module], forward: Any) -> bool:
    """Whether a class, with the forward that it has now, is one of these."""
    return issubclass(kind, _STEADY) and _runs_torchs(forward)


def hides_attributes(module: nn.Module) -> bool:
    """Whether torch's own code decides by an attribute of a module that nobody can compare.

    It is its class's, or lies in a slot, or is a number of NumPy's, a tensor or a member.
    """
    kind: Any = type(module)
    if not _runs_torchs(kind.forward) or _is_steady(kind, kind.forward):
        return False
    names = _read_by(kind, kind.forward).difference(module._modules, module._parameters)
    values = [module.__dict__.get(name, _NONE) for name in names.difference(module._buffers)]
    return any(v is _NONE or isinstance(v, (np.generic, torch.Tensor, enum.Enum)) for v in values)


@remembered
def _read_by(kind: type[nn.Module], forward: Any) -> frozenset[str]:
    """The attributes that a forward of torch's own decides by, which is that of a class."""
    home = next((b for b in kind.__mro__ if vars(b).get("forward") is forward), kind)
    constants: Any = getattr(home, "__constants__", ())
    return frozenset(("training", *constants)).intersection(forward.__code__.co_names)


def _plain_attributes(module: nn.Module) -> list[str]:
    """What code may decide by, of a kind that can be compared."""
    kind: Any = type(module)
    if type(kind.forward) is types.FunctionType and _is_steady(kind, kind.forward):
        return ["padding_mode"] if "padding_mode" in module.__dict__ else []
    own = module.__dict__
    kinds = _PLAIN | _ROWS if _runs_torchs(kind.forward) else _PLAIN
    names = [k for k in own_names(tuple(own)) if type(own[k]) in kinds]
    return ["training", *names] if type(own.get("training", _NONE)) in _PLAIN else names
