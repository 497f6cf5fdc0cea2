"""Layers that a model has not registered: by how Python gets at them, or by names of their own.

`self.layers = [nn.Linear(4, 4), nn.Linear(4, 4)]` hides two layers from `named_modules()`. What
attributes, lists, tuples, dicts and plain objects lead to goes by that path: `layers[0]`. What
nothing leads to (a weight made in the forward) goes by where it is used: `decoder:linear`.
"""

from __future__ import annotations

import types
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

_MOST = 100_000  # objects that are looked at
# Looks in a row that led to none of the tensors that are made anew in each pass: at whatever there
# is, and where one is gone that was found.
_MOST_FUTILE, _MOST_EXCHANGED = 8, 64
_LONGEST = 10_000  # items of a container: a data set has no layers
# What every module has for itself: what it has registered, hooks, flags; and what a capture sets.
_OWN = frozenset(nn.Module().__dict__) | {"_compiled_call_impl", "forward"}


@dataclass(frozen=True, slots=True)
class Found:
    """Where a tensor or a module is."""

    path: str  # how Python gets at it from the model; of a module's own tensor, at the module
    module: nn.Module | None = None  # the module that has the tensor registered; None if none has
    key: str = ""  # what it is called there


class UnregisteredLayers:
    """What can be reached from a model's modules, which `walk` gives, and is not among them."""

    def __init__(self, walk: Callable[[], Iterable[tuple[str, nn.Module]]]) -> None:
        self._walk = walk
        self._known: dict[int, tuple[weakref.ref[Any], Found]] = {}
        self._modules: dict[str, weakref.ref[nn.Module]] = {}
        self._futile = 0  # looks of late for one that nothing led to

    def find(self, value: Tensor | nn.Module, again: bool = True) -> Found | None:
        """Where it is; None if nothing leads there.

        Args:
            again: look once more, if it was not there when last looked. Else it may be made anew in
                each pass, and only where another one may be in the place of one that was found.
        """
        found = self._at(value)
        if found is None and (again or self._may_be_there()):
            self._look()
            found = self._at(value)
            if found is not None:
                self._futile = 0
            elif not again:
                self._futile += 1
        return found

    def _may_be_there(self) -> bool:
        """Whether a look may lead to a tensor that was not there when last looked."""
        if self._futile < _MOST_FUTILE:
            return True
        gone = any(ref() is None for ref, place in self._known.values() if place.module is None)
        return gone and self._futile < _MOST_EXCHANGED

    def module_at(self, path: str) -> nn.Module | None:
        """The module of a path that was found."""
        found = self._modules.get(path)
        return found() if found is not None else None

    def paths(self) -> dict[str, nn.Module | None]:
        """The paths of all modules, and of tensors that no module has registered."""
        self._look()
        found: dict[str, nn.Module | None] = {}
        for ref, place in self._known.values():
            value = ref()
            if isinstance(value, nn.Module):
                found[place.path] = value
            elif value is not None and place.module is None:
                found[place.path] = None
        return found

    def _at(self, value: Any) -> Found | None:
        found = self._known.get(id(value))
        return found[1] if found is not None and found[0]() is value else None

    def _look(self) -> None:
        """What was found before keeps its path, wherever else it is by now."""
        self._known = {k: v for k, v in self._known.items() if v[0]() is not None}
        ways: deque[tuple[str, Any]] = deque()
        seen: dict[int, Any] = {}  # by id, and kept alive meanwhile
        for name, module in self._walk():
            if id(module) not in seen:
                seen[id(module)] = module
                self._module(name, module)
                ways.extend(_attributes(name, module))
        for _ in range(_MOST):
            if not ways:
                break
            path, value = ways.popleft()
            kind = type(value)  # not what an object says that it is
            if id(value) in seen or issubclass(kind, _PLAIN):
                continue
            seen[id(value)] = value
            if issubclass(kind, Tensor):
                self._put(value, Found(path))
            elif issubclass(kind, nn.Module):
                for key, child in list(value._modules.items()):
                    if child is not None:
                        ways.append((f"{path}.{key}", child))
                self._module(path, value)
                ways.extend(_attributes(path, value))
            else:
                ways.extend(_items(path, value))

    def _module(self, path: str, module: nn.Module) -> None:
        self._put(module, Found(path))
        self._modules.setdefault(path, weakref.ref(module))
        for registered in (module._parameters, module._buffers):
            for key, tensor in list(registered.items()):
                if tensor is not None:
                    self._put(tensor, Found(path, module, key))

    def _put(self, value: Any, found: Found) -> None:
        if self._at(value) is None:
            self._known[id(value)] = weakref.ref(value), found


_PLAIN = (
    *(str, bytes, int, float, complex, type(None), type, types.ModuleType, types.FunctionType),
    *(types.BuiltinFunctionType, types.MethodType, weakref.ref),
)


def _attributes(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What an object has, read without a look at what its class makes of it."""
    try:
        own = object.__getattribute__(value, "__dict__")
    except AttributeError:
        own = {}
    for key, held in list(own.items()) if type(own) is dict else []:
        if key not in _OWN:
            yield f"{path}.{key}".lstrip("."), held
    for base in type(value).__mro__:
        if _is_of(base, "torch", "builtins"):
            continue
        for key, held in list(vars(base).items()):
            if isinstance(held, types.MemberDescriptorType):  # a slot
                try:
                    yield f"{path}.{key}".lstrip("."), held.__get__(value)
                except AttributeError:  # it is empty
                    continue
            elif issubclass(type(held), (nn.Module, Tensor, list, tuple, dict)) and key[:2] != "__":
                yield f"{path}.{key}".lstrip("."), held


def _items(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What a container has, whatever its own methods say; else the attributes of an object."""
    kind, kinds = type(value), (list, tuple, deque, dict)
    base: Any = next((k for k in kinds if issubclass(kind, k)), None)
    if base is dict and dict.__len__(value) <= _LONGEST:
        for key, held in list(dict.items(value)):
            if isinstance(key, (str, int)):
                yield f"{path}[{key!r}]", held
    elif base is not None and base is not dict and base.__len__(value) <= _LONGEST:
        for place, held in enumerate(list(base.__iter__(value))):
            yield f"{path}[{place}]", held
    if not _is_of(kind, "torch", "fmapkit"):
        yield from _attributes(path, value)


def _is_of(kind: type, *packages: str) -> bool:
    return kind.__module__.partition(".")[0] in packages


class Unnamed:
    """Names for the layers that nothing leads to, each its own for as long as a capture is open."""

    def __init__(self) -> None:
        self._places: dict[Hashable, str] = {}
        self._values: dict[int, tuple[weakref.ref[Any], str]] = {}
        self._reserved: set[str] = set()

    def at(self, place: Hashable, names: Iterator[str]) -> str:
        """The name of what is used at a place of the model's code, and made anew in each pass."""
        if place not in self._places:
            name = self._free(names)
            self._reserved.add(name)
            self._places[place] = name
        return self._places[place]

    def known(self, value: Tensor) -> str | None:
        """The name that was given to a tensor that endures."""
        found = self._values.get(id(value))
        return found[1] if found is not None and found[0]() is value else None

    def of(self, value: Tensor, place: Hashable, names: Iterator[str]) -> str:
        """The name of a tensor that endures, or was made unseen, and is found nowhere.

        The name of the place where it is used, if what that was given to is gone.
        """
        self._values = {k: v for k, v in self._values.items() if v[0]() is not None}
        name = self._places.get(place)
        if name is None or any(name == other for _, other in self._values.values()):
            name = self._free(names)
        self.keep(value, name)
        return name

    def keep(self, value: Tensor, name: str) -> None:
        """Go on calling a tensor so."""
        self._values[id(value)] = weakref.ref(value), name

    def _free(self, names: Iterator[str]) -> str:
        taken = {name for _, name in self._values.values()}
        return next(n for n in names if n not in taken and n not in self._reserved)
