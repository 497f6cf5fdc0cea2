"""torch functions that are a nonlinearity in some of their calls: in which, and of which operand.

`z.clamp(min=0)` is a ReLU, `norm.clamp(min=1e-6)` keeps a division from going wrong, and a mask may
be anything. So what counts is a ReLU in other words: a bound of zero, or a choice by a comparison
of the operand itself with zero (`z * (z > 0)`, `torch.where(z > 0, z, 0.1 * z)`). For that, the
values of a running module that are computed from one another point by point are known here. `erf`
counts where its operand carries the filters of a layer, or a norm's: it is what a GELU by hand has.

A module that is a nonlinearity written out by hand is told by how the tensors inside depend on its
input (`Linearity`): not, linearly, pointwise, or otherwise. Judged by tensor, not by module: what
the user's own hooks compute on the side does not matter.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fmapkit.provenance import vocabulary as words
from fmapkit.provenance.labels import ChannelLabel, Lookup, channels_of
from fmapkit.provenance.rule_basics import FunctionCall
from fmapkit.torchlib.memory import version_of
from fmapkit.torchlib.nested import tensors_in
from fmapkit.torchlib.transforms import unholdable

_BOUNDED = words.words("clamp clip clamp_min clamp_max")
_EXTREMES = words.words("maximum minimum fmax fmin max min")
_CHOICES = words.words("where masked_fill mul multiply")
SOMETIMES = _BOUNDED | _EXTREMES | _CHOICES | {"erf"}
_ZEROS = words.words("zeros zeros_like new_zeros")

_COMPARISONS = words.words("gt lt ge le greater less greater_equal less_equal")
# What a comparison may go through before something is chosen by it.
_MASKS = words.words(
    """logical_not logical_and logical_or logical_xor bitwise_not bitwise_and bitwise_or
    bitwise_xor __invert__ __and__ __or__ __xor__ to type type_as float half bfloat16 double"""
)
_LIKE = {"type_as", "to"}  # their second operand says which dtype, and no more
_OF_MASKS = _MASKS | {"mul", "multiply"}
_POINTWISE = (
    words.NONLINEAR_POINTWISE | words.LINEAR_BINARY | words.PRODUCTS | words.LINEAR_KEEPERS | _MASKS
) - words.DROPOUTS
# The functions of which `Pointwise.step` has something to note; it has of a nonlinearity, too.
FOLLOWED = _POINTWISE | _ZEROS | {"tensor"}
_FAR = 256  # how many values an operand is looked for in


@dataclass(slots=True, eq=False)
class _Value:
    """A tensor, by what it is computed from."""

    # The values it is computed from, point by point; none if it came from elsewhere.
    of: tuple[_Value, ...] = ()
    mask: bool = False  # it says where a comparison holds
    zero: bool = False  # it is nothing but zeros; of a mask: something was compared with zero

    def depends_on(self, other: _Value) -> bool:
        """Whether it is the other one, or computed from that alone."""
        sources = self._sources(other)
        return len(sources) < _FAR and all(v.of or v is other for v in sources)

    def common(self, others: Sequence[_Value]) -> bool:
        """Whether it and others are computed from one value alone."""
        return any(all(v.depends_on(s) for v in (self, *others)) for s in self._sources())

    def _sources(self, stop: _Value | None = None) -> list[_Value]:
        """It and what it is computed from, the nearest first; of one value, no further back."""
        found: dict[int, _Value] = {}
        left = deque([self])
        while left and len(found) < _FAR:
            value = left.popleft()
            if id(value) not in found:
                found[id(value)] = value
                left += value.of if value is not stop else ()
        return list(found.values())


class Pointwise:
    """The values of one running module that are computed from one another point by point."""

    __slots__ = ("_known", "asked")

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], int, _Value]] = {}
        # Tensors of one number that were asked whether they are zero, since somebody looked.
        self.asked: list[Tensor] = []

    def value(self, tensor: Tensor, written: int = 0) -> _Value:
        """What is known of a tensor that was `written` to so often since its value was."""
        found = self._known.get(id(tensor))
        if found is not None and found[0]() is tensor:
            if found[1] + written == version_of(tensor):
                return found[2]
        return self._put(tensor, _Value())

    def _put(self, tensor: Tensor, value: _Value) -> _Value:
        self._known[id(tensor)] = weakref.ref(tensor), version_of(tensor), value
        return value

    def step(self, call: FunctionCall, label: Lookup, sigma: bool) -> None:
        """A function has run in the module itself; the arguments are those of `Linearity.step`."""
        name, args, out, operands = call.name, call.args, call.out, call.operands
        if not isinstance(out, Tensor):
            return
        if not (sigma or name in _POINTWISE):
            if name in _ZEROS or (name == "tensor" and bool(args) and self.is_zero(args[0])):
                self._put(out, _Value(zero=True))
            return
        if name in _LIKE:
            operands = operands[:1]
        values = tuple([self.value(t, written=t is out) for t in operands if label(t) is not None])
        if not values:
            return
        compared = name in _COMPARISONS
        mask = compared or (name in _OF_MASKS and all(v.mask for v in values))
        if compared:
            zero = any(self.is_zero(a) for a in (*args, *call.kwargs.values()))
        else:
            zero = mask and any(v.zero for v in values)
        self._put(out, _Value(values, mask, zero))

    def is_zero(self, value: Any, else_: bool = False) -> bool:
        """Whether a number is zero, or a tensor nothing but zeros; no device is waited for.

        `else_` is the answer for a single number on another device.
        """
        if not isinstance(value, Tensor):
            return isinstance(value, (int, float)) and value == 0
        found = self._known.get(id(value))
        if found is not None and found[0]() is value and found[1] == version_of(value):
            return found[2].zero and not found[2].mask
        if unholdable(value) or value.numel() != 1:
            return False
        if type(value) not in (Tensor, nn.Parameter) or value.device.type != "cpu":
            return else_
        self.asked.append(value)
        with torch._C.DisableTorchFunction():
            return bool(value == 0)


def operand_of_sigma(call: FunctionCall, label: Lookup, inside: Pointwise) -> Tensor | None:
    """What a call of one of `SOMETIMES` receives as a nonlinearity: z; None if it is none.

    What it has written to is its result: None before it runs.
    """
    name = call.name
    operands = tensors_in(*call.args, {k: v for k, v in call.kwargs.items() if k != "out"})
    channel_labels = [t for t in operands if isinstance(label(t), ChannelLabel)]
    if not channel_labels or any(map(unholdable, operands)):
        return None
    if name in _CHOICES or (name in _EXTREMES and len(channel_labels) > 1):
        values = [inside.value(t, written=t is call.out) for t in channel_labels]
        z = _compared(name, channel_labels, values)
    elif name in _BOUNDED:
        z = _bounded(call, channel_labels, inside)
    elif name in _EXTREMES:
        z = _extreme(operands, channel_labels[0], label, inside)
    else:
        z = channel_labels[0] if _has_filters(label(channel_labels[0])) else None
    if z is None or not (z.is_floating_point() or z.is_complex() or z.is_quantized):
        return None
    if z.dim() < 2 and not _has_filters(label(z)):
        return None  # a statistic: an observer's smallest value, say
    return z if all(_fits(t, z) for t in operands) else None


def chooses_unseen(call: FunctionCall, label: Lookup, inside: Pointwise) -> ChannelLabel | None:
    """What a call carries that is a nonlinearity of a value which it is not given itself.

    As in `torch.where(z > 0, 2 * z, 3 * z)`. None where it is none, or no filters of a layer
    reach it.
    """
    name, channel_labels = (
        call.name,
        [t for t in call.operands if isinstance(label(t), ChannelLabel)],
    )
    carried = [
        found for t in channel_labels if (found := channels_of(label, t)) and _has_filters(found)
    ]
    if name not in _CHOICES or not carried:
        return None
    if name == "where" and len(call.args) + len(call.kwargs) < 3:  # places, and no choice
        return None
    values = list(map(inside.value, channel_labels))
    if not any(v.mask and v.zero for v in values) or (
        name != "where" and all(v.mask for v in values)
    ):
        return None
    return carried[0] if values[0].common(values[1:]) else None


def _compared(name: str, channel_labels: list[Tensor], values: list[_Value]) -> Tensor | None:
    """The operand that all others are computed from, where some comparison of it chooses."""
    if name in _CHOICES and not any(v.mask and v.zero for v in values):
        return None
    for z, value in zip(channel_labels, values, strict=True):
        if not value.mask and all(v.depends_on(value) for v in values):
            return z
    return None


def _bounded(call: FunctionCall, channel_labels: list[Tensor], inside: Pointwise) -> Tensor | None:
    """The operand of `clamp`, if a bound of it is zero."""
    if len(channel_labels) > 1:
        return None
    places = [(1, "min"), (2, "max")]
    if call.name in ("clamp_min", "clamp_max"):
        places = [(1, call.name.removeprefix("clamp_"))]
    return (
        channel_labels[0]
        if any(inside.is_zero(call.argument(*place)) for place in places)
        else None
    )


def _extreme(operands: list[Tensor], z: Tensor, label: Lookup, inside: Pointwise) -> Tensor | None:
    """The operand of a maximum or minimum with zero."""
    others = [t for t in operands if t is not z]
    zero = len(others) == 1 and inside.is_zero(others[0], else_=_has_filters(label(z)))
    return z if zero else None


def _has_filters(label: Any) -> bool:
    return isinstance(label, ChannelLabel) and label.origin.kind != "none"


def _fits(operand: Tensor, z: Tensor) -> bool:
    """Whether the result has the shape of z, whatever else is broadcast to it."""
    if operand.dim() > z.dim():
        return False
    pairs = zip(reversed(operand.shape), reversed(z.shape), strict=False)
    return all(n in (1, m) for n, m in pairs)


# -- modules -------------------------------------------------------------------------------------

# A tensor that does not depend on the input has 0. The last is not pointwise, or random.
_LINEAR, _NONLINEAR, _OTHER = 1, 2, 3


class Linearity:
    """How the tensors in one call of a module depend on its input."""

    __slots__ = ("_known", "reduces")

    def __init__(self, x: Tensor) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self.reduces = False  # some function inside took a mean, a sum or the like
        self.enter(x)

    def enter(self, x: Tensor) -> None:
        """A tensor is the module's input."""
        self._known[id(x)] = (weakref.ref(x), _LINEAR)

    def is_nonlinear(self, tensor: Tensor) -> bool:
        """Whether it is the input, changed pointwise and not linearly."""
        found = self._known.get(id(tensor))
        return found is not None and found[0]() is tensor and found[1] == _NONLINEAR

    def _of(self, tensor: Tensor, label: Lookup) -> int:
        found = self._known.get(id(tensor))
        if found is not None and found[0]() is tensor:
            return found[1]
        # Depends on the model's input, but did not come in through the module's argument.
        return _OTHER if isinstance(label(tensor), ChannelLabel) else 0

    def step(self, call: FunctionCall, label: Lookup, nonlinear: bool) -> None:
        """One function has run inside the module."""
        name, operands = call.name, call.operands
        degrees = [self._of(t, label) for t in operands]
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
