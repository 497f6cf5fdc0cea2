"""Which modules take the same road in every pass, proven from their source.

A later pass can be read with one hook per nonlinearity only where the data is bound to flow as it
did when it was learned. A module is *proven* when its forward, and that of everything below it,
has no branch, loop or choice that could depend on data: each test reads only plain attributes of
`self` (they become guards, compared before each pass), constants, or whether a value is None.
Anything else is unproven, which costs time, never correctness: an unproven module's own forward is
watched in each pass.

Names of torch are trusted to do one thing; Python functions are followed into.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fmapkit._guards import SIMPLE, Evidence, Guard
from fmapkit._hooks import hooks_on
from fmapkit._optimized import is_compiled
from fmapkit._proof_reader import read_function
from fmapkit._proof_scope import UnprovenError
from fmapkit._proof_trusted import is_trusted_module

__all__ = ["Proofs"]


class Proofs:
    """Proofs for the modules of one model, made on demand and kept while its structure stands."""

    def __init__(self, is_ours: Callable[[Any], bool]) -> None:
        self._known: dict[int, bool] = {}
        self._numbers: set[int] = set()  # modules, by id, that make something of numbers
        self._guards: dict[int, list[Guard]] = {}
        self._alike: dict[Any, tuple[bool, Evidence]] = {}  # by signature
        self._is_ours = is_ours

    def proven(self, module: nn.Module) -> bool:
        """Whether the module and everything below it always takes the same road."""
        found = self._known.get(id(module))
        if found is None:
            self._known[id(module)] = False  # a module inside itself is unproven
            found = self._own(module) and all(self.proven(c) for c in module.children())
            self._known[id(module)] = found
        return found

    def guards(self, module: nn.Module) -> list[Guard]:
        """Every guard the proof of a module and those below it rests on."""
        guards = (g for m in module.modules() for g in self._guards.get(id(m), ()))
        return list({(id(g.module), g.path, g.none_only): g for g in guards}.values())

    def numbers(self, module: nn.Module) -> bool:
        """Whether numbers that a proven module is given may pick filters, or axes."""
        return any(id(m) in self._numbers for m in module.modules())

    def _own(self, module: nn.Module) -> bool:
        if not all(map(self._is_ours, hooks_on(module))) or "forward" in module.__dict__:
            return False
        if is_compiled(module):
            return False
        kind = type(module)
        if kind.__getattr__ is not nn.Module.__getattr__:
            return False  # reading an attribute may run anything
        if kind.__call__ is not nn.Module.__call__ or isinstance(module, torch.jit.ScriptModule):
            return False
        if is_trusted_module(module):
            return True
        alike = _signature(module)
        known = self._alike.get(alike)
        if known is None:
            known = _read(module)
            if not known[1].deep:
                self._alike[alike] = known
        proven, evidence = known
        if evidence.numbers:
            self._numbers.add(id(module))
        read = evidence.module  # another one of the same form, perhaps
        mine = {id(read): module, id(read.__dict__): module.__dict__}
        self._guards[id(module)] = [
            replace(g, module=mine.get(id(g.module), g.module)) for g in evidence.guards
        ]
        return proven


def _read(module: nn.Module) -> tuple[bool, Evidence]:
    """Whether the module's own forward always takes the same road, and what that rests on."""
    evidence = Evidence(module)
    evidence.add(type(module), "forward")
    try:
        read_function(evidence, type(module).forward)
    except (UnprovenError, RecursionError):
        return False, evidence
    return True, evidence


# What every module has, whatever its class.
_COMMON = frozenset(nn.Module().__dict__) - {"training"}


def _signature(module: nn.Module) -> Any:
    """What a proof can rest on that looks no deeper than the module's own attributes."""
    own = tuple(
        (name, type(value), value if isinstance(value, SIMPLE) else id(value))
        for name, value in module.__dict__.items()
        if name not in _COMMON
    )
    children = tuple((name, type(child)) for name, child in module._modules.items())
    tensors = (*module._parameters.items(), *module._buffers.items())
    return type(module), own, children, tuple((name, value is None) for name, value in tensors)
