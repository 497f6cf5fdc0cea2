"""In-place nonlinearities on probation, while a proven module is learned.

`relu_(x)` is tried out of place, so that x stays z. That is the same to the model only if nobody
looks at the old x again. So x is under suspicion: whoever reads it gets the new tensor instead,
which is what x would have become, and from then on that site gets a copy of z and its true in-place
run.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fmapkit._aside import operators_are_counted
from fmapkit._events import Event
from fmapkit._frames import Frame
from fmapkit._functions import Function
from fmapkit._nested import tensors_in
from fmapkit._store import Aliases, storage_of, storage_users

__all__ = ["SAME_GRADIENT", "Born", "Suspects", "may_try"]

# Nonlinearities whose in-place form has the same derivative formula, bit for bit. That of the ELU
# and leaky ReLU families is computed from a instead of z (torch, tools/autograd/derivatives.yaml).
SAME_GRADIENT = {
    *("relu", "relu6", "hardtanh", "sigmoid", "tanh", "silu", "hardswish", "mish", "hardsigmoid"),
    "threshold",
}


class Born:
    """Memory that was made while a module is learned, by functions that the tracer saw.

    All other was there before and may be there afterwards, whoever has it: arguments, buffers,
    attributes, tensors of a closure, a class or a Python module.
    """

    __slots__ = ("_storages",)

    def __init__(self) -> None:
        self._storages: set[int] = set()

    def clear(self) -> None:
        """Another module is about to be learned."""
        self._storages.clear()

    def made(self, known: Function, args: Any, kwargs: Any, out: Any) -> None:
        """A function has run: what it returns is new, unless it is its operands' memory."""
        if known.name.startswith("__get__"):  # `.data`, `.T`, `.grad`
            return
        for tensor in (out,) if isinstance(out, Tensor) else tensors_in(out):
            storage = storage_of(tensor)
            if storage not in self._storages:
                if all(storage_of(t) != storage for t in tensors_in(*args, kwargs)):
                    self._storages.add(storage)

    def __contains__(self, tensor: Tensor) -> bool:
        # What is not torch's own (NumPy's, say) may lie where a tensor was that died meanwhile.
        storage = storage_of(tensor)
        return storage in self._storages and tensor.untyped_storage().resizable()


def may_try(
    sigma: str | None, z: Tensor, frames: Sequence[Frame], aliases: Aliases, born: Born
) -> bool:
    """Whether an in-place σ may run out of place.

    Not on memory that was not born in the module that is learned, nor on memory that another tensor
    shares (our own aliases excepted): those would see the write.
    """
    if z.is_leaf and z.requires_grad:
        return False
    if any(f.site is not None for f in frames):
        return False
    if torch.is_grad_enabled() and sigma not in SAME_GRADIENT:
        return False
    if operators_are_counted():
        return False
    ours = len(aliases.of(z)) if aliases.detach else 0
    return storage_users(z) == 1 + ours and z in born


class Suspects:
    """Tensors that should not be read any more.

    Attributes:
        known: by id, each with what it would have become, and the event or frame to blame.
    """

    __slots__ = ("known",)

    def __init__(self) -> None:
        self.known: dict[int, tuple[weakref.ref[Tensor], Tensor, Event | Frame]] = {}

    def add(self, z: Tensor, became: Any, culprit: Event | Frame) -> None:
        """From here on, z should not be read any more; it usually dies at once."""
        key, known = id(z), self.known

        def died(reference: Any) -> None:
            if key in known and known[key][0] is reference:
                del known[key]

        known[key] = (weakref.ref(z, died), became, culprit)

    def exchange(self, value: Any, aliases: Aliases) -> Any:
        """Whoever reads a tensor that an in-place σ would have changed gets the changed one."""
        if isinstance(value, Tensor):
            found = self.known.get(id(value))
            if found is None:
                return value
            reference, became, culprit = found
            if reference() is not value:
                return value
            culprit.flip = False
            for held in aliases.of(value):
                held.doomed = True  # from the next pass on, the σ runs in place
            return self.exchange(became, aliases)  # which may have been overwritten in its turn
        if type(value) in (tuple, list) and tensors_in(value):
            return type(value)([self.exchange(v, aliases) for v in value])
        if type(value) is dict and value:
            return {k: self.exchange(v, aliases) for k, v in value.items()}
        return value
