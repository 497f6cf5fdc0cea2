"""Who is who in a model: qualified names of modules, and whose parameter a weight is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fmapkit import layers
from fmapkit._optimized import is_optimized

__all__ = ["Names"]


class Names:
    """The names of one model's modules and parameters, read once and again when it changes."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.by_module: dict[nn.Module, str] = {}
        self.by_name: dict[str, nn.Module] = {}
        self._owners: dict[int, tuple[Tensor, list[tuple[nn.Module, str]]]] = {}
        self._around: dict[nn.Module, str] = {}
        self.refresh()

    def refresh(self) -> None:
        """Read the model anew."""
        self.by_module.clear()
        self.by_name.clear()
        self._owners.clear()
        self._around.clear()
        wrapped: set[str] = set()  # where torch.compile has put a module around another
        for path, module in self.model.named_modules(remove_duplicate=False):
            name = _without(path, wrapped)
            if is_optimized(module):
                wrapped.add(path)
                self._around[module] = name
                continue
            self.by_name[name] = module
            if module in self.by_module:
                continue
            self.by_module[module] = name
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    owners = self._owners.setdefault(id(parameter), (parameter, []))[1]
                    owners.append((module, key))

    def of(self, module: nn.Module) -> str:
        """The module's qualified name; its class where it is not part of the model."""
        found = self.by_module.get(module)
        if found is None:
            found = self._around.get(module)
        return found if found is not None else type(module).__name__

    def is_parameter(self, value: Any) -> bool:
        """Whether it is a parameter of the model."""
        found = self._owners.get(id(value))
        return (found is not None and found[0] is value) or isinstance(value, nn.Parameter)

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
        owners = self._owners.get(id(parameter), (None, []))[1]
        if not owners:
            return self.of(inner)
        running = [o for m in reversed(stack) for o in owners if o[0] is m]
        module, key = (running or owners)[0]
        name = self.of(module)
        if ".parametrizations." in f".{name}.":
            return self._without_parametrization(name)
        weights = [p for p in module._parameters.values() if p is not None and p.dim() >= 2]
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


def _without(path: str, wrapped: set[str]) -> str:
    """A path as it is in the plain model: without the name under which a wrapper has it."""
    parts = path.split(".")
    return ".".join(
        part for i, part in enumerate(parts) if i == 0 or ".".join(parts[:i]) not in wrapped
    )
