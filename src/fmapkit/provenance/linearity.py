"""How the tensors inside a module depend on its input: not, linearly, pointwise, or otherwise.

That tells a nonlinearity written out by hand. Judged by tensor, not by module: what the user's own
hooks compute on the side does not matter.
"""

from __future__ import annotations

import weakref

from torch import Tensor

from fmapkit.provenance import vocabulary as words
from fmapkit.provenance.labels import ChannelLabel, Lookup
from fmapkit.provenance.rule_basics import FunctionCall
from fmapkit.torchlib.nested import tensors_in

# A tensor that does not depend on the input has 0. The last is not pointwise, or random.
_LINEAR, _NONLINEAR, _OTHER = 1, 2, 3


class Linearity:
    """Of one call of a module.

    Attributes:
        reduces: some function inside took a mean, a sum or the like.
    """

    __slots__ = ("_known", "reduces")

    def __init__(self, x: Tensor) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self.reduces = False
        self.enter(x)

    def enter(self, x: Tensor) -> None:
        """A tensor is the module's input."""
        self._known[id(x)] = (weakref.ref(x), _LINEAR)

    def is_nonlinear(self, tensor: Tensor) -> bool:
        """Whether it is the input, changed pointwise and not linearly."""
        found = self._known.get(id(tensor))
        return found is not None and found[0]() is tensor and found[1] == _NONLINEAR

    def _of(self, tensor: Tensor, tag: Lookup) -> int:
        found = self._known.get(id(tensor))
        if found is not None and found[0]() is tensor:
            return found[1]
        # Depends on the model's input, but did not come in through the module's argument.
        return _OTHER if isinstance(tag(tensor), ChannelLabel) else 0

    def step(self, call: FunctionCall, tag: Lookup, nonlinear: bool) -> None:
        """One function has run inside the module."""
        name, operands = call.name, call.operands
        degrees = [self._of(t, tag) for t in operands]
        highest = max(degrees, default=0)
        if name in words.DROPOUTS:
            result = _OTHER
        elif highest == 0 or name in words.FRESH:
            return
        # `torch.max` and `min` of two tensors are pointwise; of one, they reduce it.
        elif (
            nonlinear
            or name in words.NONLINEAR_POINTWISE
            or (name in ("max", "min") and len(operands) > 1)
        ):
            result = max(highest, _NONLINEAR)
        elif name in words.PRODUCTS:
            dividing = name in ("div", "divide", "true_divide") and len(degrees) > 1
            by_input = sum(d > 0 for d in degrees) > 1 or (dividing and degrees[-1] > 0)
            curved = by_input or name.startswith("__r")
            result = max(highest, _NONLINEAR) if curved else highest
        elif _is_linear(call):
            result = highest
        else:
            self.reduces = self.reduces or name in words.REDUCTIONS or name in words.NORM_AXIS
            result = _OTHER
        # It returns nothing, and writes to its first operand.
        for tensor in operands[:1] if name == "__setitem__" else tensors_in(call.out):
            self._known[id(tensor)] = (weakref.ref(tensor), result)


def _is_linear(call: FunctionCall) -> bool:
    """Whether each point of the result is one of the operands', or a sum of such."""
    name, out = call.name, call.out
    if name == "stack":  # along a new last axis, which `view_as_complex` alone takes away again
        dim = call.argument(1, "dim") or 0
        return isinstance(out, Tensor) and dim in (-1, out.dim() - 1)
    if name in words.RESHAPES:  # to the shape that it has
        return isinstance(out, Tensor) and out.shape == call.operands[0].shape
    return name in words.LINEAR_BINARY or name in words.LINEAR_KEEPERS or name == "copy"
