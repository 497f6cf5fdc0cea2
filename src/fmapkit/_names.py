"""Who is who in a model: qualified names of modules, and whose parameter a weight is.

The names are those of the plain model: a module that only carries another one
(`DistributedDataParallel`) adds no level, and goes by the name of what it carries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from fmapkit import layers
from fmapkit._past_hooks import PastHooks
from fmapkit._sharded import is_dtensor
from fmapkit._store import storage_of
from fmapkit._wrappers import (
    flat_parameters,
    inner_key,
    is_flat,
    lends_parameters,
    places_in,
)

__all__ = ["Names"]


class Names:
    """The names of one model's modules and parameters, read once and again when it changes.

    Attributes:
        version: another one whenever other parameters are known than before.
        past_hooks: finds modules of the model that run without their hooks.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.by_module: dict[nn.Module, str] = {}
        self.by_name: dict[str, nn.Module] = {}
        self.wrappers: set[nn.Module] = set()
        self.lent = False  # parameters that have memory only while their module runs (FSDP)
        self._owners: dict[int, tuple[Tensor, list[tuple[nn.Module, str]]]] = {}
        self._flat: list[Any] = []  # flat parameters of old FSDP
        self._empty: list[Any] = []  # where modules without parameters would have them
        self._full: list[Any] = []  # where the others do
        self._counts: list[int] = []  # how many there are each time
        self._parameters: list[Any] = []  # and what they are, one after the other
        self._arrangements: dict[tuple[int, ...], int] = {}
        self._sharing = (-1, 0)  # at which version, and which arrangement
        self.version = 0
        self.refresh()

    def refresh(self) -> None:
        """Read the model anew."""
        self.by_module.clear()
        self.by_name.clear()
        self.wrappers.clear()
        self._flat.clear()
        self.lent = False
        for name, module in _walk(self.model, ""):
            self.by_name[name] = module  # of a wrapper, what it carries: that comes after it
            if module in self.by_module:
                continue
            self.by_module[module] = name
            if inner_key(module) is not None:
                self.wrappers.add(module)
            self.lent = self.lent or lends_parameters(module)
            self._flat += flat_parameters(module)
        self.past_hooks = PastHooks(self.by_module)
        self._read_parameters()

    @property
    def lends(self) -> bool:
        """Whether some parameters, as far as is known, may have memory for a while only."""
        return self.lent or bool(self._flat)

    def update(self) -> None:
        """Notice parameters that were swapped, for good or for one call (`functional_call`)."""
        if self._swapped():
            self._read_parameters()

    def sharing(self) -> int:
        """Tells which places have one parameter together: the number of that arrangement."""
        if self._sharing[0] != self.version:
            first: dict[int, int] = {}
            shape = tuple([first.setdefault(id(p), at) for at, p in enumerate(self._parameters)])
            number = self._arrangements.setdefault(shape, len(self._arrangements))
            self._sharing = self.version, number
        return self._sharing[1]

    def _swapped(self) -> bool:
        """Nothing is made on the way: after a pass, what it costs is memory to look at."""
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
        for module in self.by_module:
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    owners = self._owners.setdefault(id(parameter), (parameter, []))[1]
                    owners.append((module, key))

    def of(self, module: nn.Module) -> str:
        """The module's qualified name; its class where it is not part of the model."""
        found = self.by_module.get(module)
        return found if found is not None else type(module).__name__

    def is_parameter(self, value: Any) -> bool:
        """Whether it is a parameter of the model."""
        found = self._owners.get(id(value))
        if found is not None and found[0] is value:
            return True
        if type(value) is not Tensor and isinstance(value, nn.Parameter):
            return True
        return bool(self.in_flat(value))

    def _owned_by(self, parameter: Tensor) -> list[tuple[nn.Module, str]]:
        """The modules that have it, and as what."""
        found = self._owners.get(id(parameter))
        if found is not None and found[0] is parameter:
            return found[1]
        # FSDP puts other tensors in their place while a module runs.
        return self.in_flat(parameter) or [
            (module, key)
            for module in self.by_module
            for key, value in module._parameters.items()
            if value is parameter
        ]

    def in_flat(self, value: Tensor) -> list[tuple[nn.Module, str]]:
        """Whose parameter, and which, a view into the flat one of old FSDP is."""
        base = value._base
        if base is not None and is_flat(base) and all(f is not base for f in self._flat):
            self._flat.append(base)  # of a wrapper around the captured model
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

    def owners(self, parameter: Tensor) -> list[tuple[nn.Module, str]]:
        """The modules that have a parameter, each with its key there."""
        found = self._owners.get(id(parameter))
        return found[1] if found is not None and found[0] is parameter else []

    def layer_of(self, parameter: Tensor | None, stack: Sequence[nn.Module]) -> str:
        """The layer of a weighted function: the running layer module, or the weight's owner.

        A weight that is called `weight`, or is its owner's only one, goes by the owner's name.
        Where an owner has several, the parameter tells them apart: `attn.in_proj`, `mlp.w1`.

        Args:
            parameter: the parameter that is, or that made, the weight; None if there is none.
            stack: the running modules, outermost first.
        """
        inner = stack[-1]
        if parameter is None or layers.layer_axis(inner) is not None:
            return self._without_parametrization(self.of(inner))
        owners = self._owned_by(parameter)
        if not owners:
            return self.of(inner)
        running = [o for m in reversed(stack) for o in owners if o[0] is m]
        module, key = (running or owners)[0]
        name = self.of(module)
        if ".parametrizations." in f".{name}.":
            return self._without_parametrization(name)
        weights = [p for p in self.parameters_of(module).values() if p.dim() >= 2]
        if key == "weight" or (len(weights) <= 1 and not key.endswith("_weight")):
            return name
        part = key.removesuffix("_weight")
        return f"{name}.{part}" if name else part

    @staticmethod
    def _without_parametrization(name: str) -> str:
        head, found, _ = f".{name}".partition(".parametrizations.")
        return head.lstrip(".") if found else name

    def module_of(self, label: str) -> nn.Module | None:
        """The module a layer's label belongs to: `a.b`, `a.b:gelu` and `a.b.in_proj` -> a.b."""
        name = label.partition(":")[0]
        if name in self.by_name:
            return self.by_name[name]
        return self.by_name.get(name.rpartition(".")[0])


def _walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules`, a module at each of its places, without the level of a wrapper."""
    yield prefix, module
    inner = inner_key(module)
    for key, child in module._modules.items():
        if child is not None:
            place = key if not prefix else f"{prefix}.{key}"
            yield from _walk(child, prefix if key == inner else place)
