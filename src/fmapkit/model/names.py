"""Who is who in a model: qualified names of modules, and whose parameter a weight is.

The names are those of the plain model: a module that only carries another one
(`DistributedDataParallel`) adds no level, and goes by the name of what it carries.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fmapkit import layers
from fmapkit.model.past_hooks import PastHooks
from fmapkit.model.unregistered import Unnamed, UnregisteredLayers
from fmapkit.model.wrappers import (
    flat_parameters,
    inner_key,
    is_flat,
    is_special,
    lends_parameters,
    places_in,
)
from fmapkit.torchlib.caching import DictWatch
from fmapkit.torchlib.memory import storage_of
from fmapkit.torchlib.sharded import is_dtensor


@dataclass(frozen=True, slots=True)
class Use:
    """A weight that a function uses: all that tells whose it is."""

    weight: Tensor  # the parameter that it is, or is made of; itself if there is none
    picked: str  # which of the weights that are stacked in the parameter it is: `[3]`
    stack: Sequence[nn.Module]  # the running modules, outermost first
    is_module: bool  # the innermost is a layer
    scope: nn.Module  # the innermost that is registered
    function: str
    made: bool  # it was made from nothing in this pass
    source: str | None  # of a weight that data made, the layer that did; else None
    turn: int  # how many such weights the function was given before in this call of the module


class Names:
    """The names of one model's modules and parameters, read once and again when it changes."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.lends = False  # some parameters, as far as is known, have memory for a while only
        # By its id, each parameter, its owners, and its first place in the model.
        self._owners: dict[int, tuple[Tensor, list[tuple[nn.Module, str]], str]] = {}
        self._empty: list[Any] = []  # where modules without parameters would have them
        self._full: list[Any] = []  # where the others do
        self._counts: list[int] = []  # how many there are each time
        self._parameters: list[Any] = []  # and what they are, one after the other
        self._registered = DictWatch(())  # all these dicts
        self.elsewhere = UnregisteredLayers(lambda: _places(self.model))
        self.unnamed = Unnamed()
        self.version = 0  # another one whenever other parameters are known than before
        self.refresh()

    def refresh(self) -> None:
        """Read the model anew; a copy that somebody made before has the names that it had."""
        self.by_module: dict[nn.Module, str] = {}
        self.by_name: dict[str, nn.Module] = {}
        self.wrappers: set[nn.Module] = set()
        self._places: dict[nn.Module, list[str]] = {}  # all names of each module
        self._flat: list[Any] = []  # flat parameters of old FSDP
        self.lent = False  # parameters that have memory only while their module runs (FSDP)
        for name, module in _places(self.model):
            self.by_name[name] = module  # of a wrapper, what it carries: that comes after it
            self._places.setdefault(module, []).append(name)
            if module in self.by_module:
                continue
            self.by_module[module] = name
            if not is_special(type(module)):
                continue
            if inner_key(module) is not None:
                self.wrappers.add(module)
            self.lent = self.lent or lends_parameters(module)
            self._flat += flat_parameters(module)
        self.lends = self.lent or bool(self._flat)
        self.past_hooks = PastHooks(self.by_module)
        self._read_parameters()

    def update(self) -> None:
        """Notice parameters that were swapped, for good or for one call (`functional_call`)."""
        if self._swapped():
            self._read_parameters()

    def _swapped(self) -> bool:
        """Nothing is made on the way: after a pass, what it costs is memory to look at."""
        if not self._registered.written():
            return False
        for there in self._empty:
            if there:
                return True
        known = iter(self._parameters)
        for there, count in zip(self._full, self._counts, strict=True):
            if len(there) != count:
                return True
            for parameter in there.values():
                if parameter is not next(known):
                    return True
        return False

    def _read_parameters(self) -> None:
        self.version += 1
        self._owners.clear()
        self._empty = [m._parameters for m in self.by_module if not m._parameters]
        self._full = [m._parameters for m in self.by_module if m._parameters]
        self._counts = list(map(len, self._full))
        self._parameters = [p for there in self._full for p in there.values()]
        self._registered = DictWatch([*self._empty, *self._full])
        for module in self.by_module:
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    owners: list[tuple[nn.Module, str]] = []
                    first = parameter, owners, f"{self.by_module[module]}.{key}"
                    self._owners.setdefault(id(parameter), first)[1].append((module, key))

    def of(self, module: nn.Module) -> str:
        """The module's qualified name; its class where it is not part of the model."""
        found = self.by_module.get(module)
        return found if found is not None else type(module).__name__

    def is_parameter(self, value: Any) -> bool:
        """Whether it is a parameter of the model."""
        if self.owners(value):
            return True
        if type(value) is not Tensor and isinstance(value, nn.Parameter):
            return True
        return bool(self.in_flat(value))

    def owned_by(self, parameter: Tensor) -> list[tuple[nn.Module, str]]:
        """The modules that have it, and as what."""
        # FSDP puts other tensors in their place while a module runs.
        return (
            self.owners(parameter)
            or self.in_flat(parameter)
            or [
                (module, key)
                for module in self.by_module
                for registered in (module._parameters, module._buffers)
                for key, value in registered.items()
                if value is parameter
            ]
        )

    def in_flat(self, value: Tensor) -> list[tuple[nn.Module, str]]:
        """Whose parameter, and which, a view into the flat one of old FSDP is."""
        base = value._base
        if base is not None and is_flat(base) and all(f is not base for f in self._flat):
            self._flat.append(base)  # of a wrapper around the captured model
            self.lends = True
        if not self._flat:
            return []
        flats = [f for f in self._flat if storage_of(f) == storage_of(value)]
        return [place for f in flats for place in places_in(f) if getattr(*place, None) is value]

    def collective(self) -> str:
        """Which module exchanges data with other ranks while it runs; empty if none is known."""
        for module, name in self.by_module.items():
            if (
                lends_parameters(module)
                or isinstance(module, nn.SyncBatchNorm)
                or any(map(is_dtensor, module._parameters.values()))
            ):
                return name or type(module).__name__
        return ""

    def parameters_of(self, module: nn.Module) -> dict[str, Tensor]:
        """Its own parameters by key, those in a flat parameter included."""
        found: dict[str, Tensor] = {k: p for k, p in module._parameters.items() if p is not None}
        for flat in self._flat:
            found.update({k: getattr(m, k) for m, k in places_in(flat) if m is module})
        return found

    def place_of(self, parameter: Tensor) -> str | None:
        """The first place of a parameter in the model; None if it has none."""
        found = self._owners.get(id(parameter))
        if (found is None or found[0] is not parameter) and isinstance(parameter, nn.Parameter):
            self.update()  # back from a `functional_call`
            found = self._owners.get(id(parameter))
        return found[2] if found is not None and found[0] is parameter else None

    def owners(self, parameter: Tensor) -> list[tuple[nn.Module, str]]:
        """The modules that have a parameter, each with its key there."""
        found = self._owners.get(id(parameter))
        return found[1] if found is not None and found[0] is parameter else []

    def of_its_own(self, weight: Tensor, inner: nn.Module) -> str | None:
        """The label where the innermost module, a layer, uses its own weight, as nearly all do."""
        if inner._parameters.get("weight") is not weight or layers.layer_axis(inner) is None:
            return None
        name = self.by_module.get(inner)
        if name is None or self.unnamed.known(weight) is not None:
            return None
        return self._without_parametrization(name)

    def layer_of(self, use: Use) -> tuple[str, bool]:
        """The layer of a weighted function: the running layer module, or the weight's owner.

        A weight that is called `weight`, or is its owner's only one, goes by the owner's name.
        Where an owner has several, the parameter tells them apart: `attn.in_proj`, `mlp.w1`. One
        of several weights that are stacked in a parameter goes by parameter and index:
        `experts.up[3]`. Owners that are not registered go by how Python gets at them, `layers[0]`,
        and what nothing leads to by the module that uses it and the function: `decoder:linear`.

        Returns:
            Its label; and whether the rows of such a weight mean the same in each pass.
        """
        parameter = isinstance(use.weight, nn.Parameter)
        name = self.unnamed.known(use.weight)
        if name is not None:
            return name + use.picked, True
        inner = use.stack[-1]
        owners = self.owned_by(use.weight) if use.source is None else []
        picked_here = use.picked and any(module is inner for module, _ in owners)
        if use.is_module and not picked_here:
            place = self.place(inner)
            if place is not None:
                return self._without_parametrization(place), True
        running = [o for m in reversed(use.stack) for o in owners if o[0] is m]
        if owners:
            module, key = (running or owners)[0]
            return self._of_key(self.of(module), module, key, use.picked), True
        if use.source is None:
            found = self.elsewhere.find(use.weight, again=parameter or use.made)
            if found is not None:
                name = found.path
                if found.module is not None:
                    name = self._of_key(name, found.module, found.key, "")
                self.unnamed.keep(use.weight, name)
                return name + use.picked, True
        return self._unnamed(use, parameter) + use.picked, use.source is None

    def _unnamed(self, use: Use, parameter: bool) -> str:
        """A name for a weight that nothing leads to."""
        name = self.of(use.scope)
        called = f"{name}:{use.function}"
        names = itertools.chain([called], (f"{called}#{n}" for n in itertools.count(1)))
        place = (name, use.function, use.source, use.turn)
        if parameter and not use.made:
            return self.unnamed.of(use.weight, place, names)
        if not parameter and not use.scope._modules and not self._weights(use.scope):
            names = itertools.chain([name], names)
        name = self.unnamed.at(place, names)
        if parameter:
            self.unnamed.keep(use.weight, name)  # it may be registered later on
        return name

    def place(self, module: nn.Module, again: bool = True) -> str | None:
        """A module's name, or how Python gets at it; None if nothing leads there.

        `again` looks once more, if it was not there when last looked.
        """
        name = self.by_module.get(module)
        if name is None:
            found = self.elsewhere.find(module, again)
            name = found.path if found is not None else None
        return name

    def _of_key(self, name: str, module: nn.Module, key: str, picked: str) -> str:
        """The name of a layer whose weight is a module's, called so there."""
        if ".parametrizations." in f".{name}.":
            return self._without_parametrization(name)
        if picked:
            return f"{name}.{key}{picked}".lstrip(".")
        if key == "weight":
            return name
        others = [k for k in self._weights(module) if k != key]
        if key in module._buffers:
            others += [
                k for k, b in module._buffers.items() if b is not None and b.dim() > 1 and k != key
            ]
        if not (others or key.endswith("_weight")):
            return name
        part = key.removesuffix("_weight")
        return f"{name}.{part}" if name else part

    def labels_in(self, name: str) -> set[str]:
        """The labels of layers whose weights are parameters of a module; not of stacked ones."""
        module = self.by_name[name]
        if layers.layer_axis(module) is not None:
            return {name}
        keys = [key for key in self.parameters_of(module) if not key.endswith("bias")]
        return {self._of_key(name, module, key, "") for key in keys}

    def _weights(self, module: nn.Module) -> list[str]:
        """What may be weights of a module."""
        return [key for key, p in self.parameters_of(module).items() if p.dim() >= 2]

    @staticmethod
    def _without_parametrization(name: str) -> str:
        head, found, _ = f".{name}".partition(".parametrizations.")
        return head.lstrip(".") if found else name

    def module_of(self, label: str) -> nn.Module | None:
        """The module a layer's label belongs to: `a.b`, `a.b:gelu` and `a.b.in_proj` -> a.b."""
        plain = label.partition(":")[0]
        if plain not in self.by_name and (beside := self.elsewhere.module_at(plain)) is not None:
            return beside
        found = self.head(label)
        return self.by_name[found] if found is not None else None

    def head(self, label: str) -> str | None:
        """The name of the registered module that a label begins with; None if there is none."""
        for name in (label, label.partition(":")[0]):
            if name in self.by_name:
                return name
        name = label.partition(":")[0].partition("[")[0].rpartition(".")[0]
        return name if name in self.by_name else None

    def other_names(self, label: str) -> list[str]:
        """The same label by the other names of its module, if it is registered more than once."""
        head = self.head(label)
        if head is None:
            return []
        rest = label[len(head) :]
        return [f"{name}{rest}" for name in self._places[self.by_name[head]] if name != head]

    def children(self, module: nn.Module) -> list[nn.Module]:
        """Its children, those in a wrapper in its place."""
        name = self.by_module[module]
        places = (f"{name}.{key}" if name else key for key in module._modules)
        return [self.by_name[place] for place in places if place in self.by_name]

    def canonical(self, label: str) -> str:
        """A label by the name that its maps have."""
        head = self.head(label)
        if not head:
            return label
        return f"{self.by_module[self.by_name[head]]}{label[len(head) :]}"


def never_called(module: nn.Module) -> bool:
    """Whether a module only holds others, or parameters: it has no forward (`nn.ModuleList`)."""
    kind: Any = type(module)
    plain = kind.__call__.__module__.startswith("torch.")  # that of a `ParameterList` only raises
    if not plain or "forward" in module.__dict__ or isinstance(module, torch.jit.ScriptModule):
        return False
    found: bool = kind.forward is nn.Module.forward
    return found


def _places(model: nn.Module) -> list[tuple[str, nn.Module]]:
    places: list[tuple[str, nn.Module]] = []
    _walk(model, "", places)
    return places


def _walk(module: nn.Module, prefix: str, places: list[tuple[str, nn.Module]]) -> None:
    """`named_modules`, a module at each of its places, without the level of a wrapper."""
    places.append((prefix, module))
    if module._modules:
        inner = inner_key(module)
        for key, child in module._modules.items():
            if child is not None:
                place = f"{prefix}.{key}" if prefix else key
                _walk(child, prefix if key == inner else place, places)
