"""The ordinary path of a module that torch fuses, run to learn whose maps its kernel's are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fmapkit.torchlib.fused.kernels import SIGMAS, KernelMaps, activation_of, weights_of
from fmapkit.torchlib.memory import version_of
from fmapkit.torchlib.modes import ObserverMode


class OrdinaryPath(ObserverMode):
    """The ordinary path of a module runs, whose layers give what they gave in the fused kernel.

    It lies below the tracer on torch's stack, which so sees what the kernel computed.
    """

    def __init__(self, module: nn.Module, maps: KernelMaps, opened: Callable[[Any], Any]) -> None:
        super().__init__()
        self.given: dict[str, Tensor] = {}  # those that were given so far, by name
        self._maps = maps
        # A function of torch's that hides from modes what it calls, as they see it; or None.
        self._opened = opened
        weights = weights_of(module)
        names = {id(weight): name for name, (weight, _) in weights.items()}
        self._names = names if len(names) == len(weights) else {}  # two layers may have one weight

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        opened = self._opened(func)
        if opened is not None:
            with self:
                return opened(*args, **(kwargs or {}))
        version = version_of(args[0]) if args and isinstance(args[0], Tensor) else 0
        output = func(*args, **(kwargs or {}))
        if args and output is args[0]:
            if version_of(output) != version or (version < 0 and _in_place(func, kwargs)):
                self._written(func, output)
            return output
        name = None
        if func is F.linear:
            name = self._names.get(id(args[1])) if len(args) > 1 else None
        elif getattr(func, "__name__", "") in SIGMAS and args:
            name = next((activation_of(n) for n, z in self.given.items() if z is args[0]), None)
        if name is None or name not in self._maps.names or name in self.given:
            return output
        if not self._maps.fits(name, output):
            return output
        self.given[name] = self._maps[name]
        return self.given[name]

    def _written(self, func: Any, tensor: Tensor) -> None:
        """A function has worked in place: what lies there is the map no more that was given."""
        name = next((name for name, given in self.given.items() if given is tensor), None)
        if name is None:
            return
        del self.given[name]
        if name.endswith("linear1") and getattr(func, "__name__", "").rstrip("_") in SIGMAS:
            self.given[activation_of(name)] = tensor


def _in_place(func: Any, kwargs: Any) -> bool:
    """Whether a function works in place that has returned what it was given."""
    return func.__name__.endswith("_") or bool(kwargs and kwargs.get("inplace"))
