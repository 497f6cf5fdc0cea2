"""What rules for torch's functions are made of: the call that they are asked about, and its parts.

A rule's form is told here, too, and what most of them do.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fmapkit.provenance.labels import NOWHERE, STOP, ChannelLabel, Label, Lookup, channels_of
from fmapkit.provenance.layout import ChannelLayout


@dataclass(slots=True)
class FunctionCall:
    """A call of a torch function."""

    name: str  # as `Function.name` has it
    function: Any
    args: Sequence[Any]
    kwargs: dict[str, Any]
    out: Any
    operands: list[Tensor]

    def argument(self, place: int, *names: str) -> Any:
        """An argument, by one of its names or by its place; None where it is not given."""
        return argument(self.args, self.kwargs, place, *names)


def argument(args: Sequence[Any], kwargs: dict[str, Any], place: int, *names: str) -> Any:
    """The same of a call that has not run."""
    for name in names:
        if name in kwargs:
            return kwargs[name]
    return args[place] if len(args) > place else None


# Given the channel label of the first operand that has one, that operand, the call, and what any
# tensor carries.
Rule = Callable[[ChannelLabel, Tensor, FunctionCall, Lookup], Any]


def each(out: Any, make: Callable[[Tensor], Label]) -> Any:
    """What each tensor of a result carries, nested like the result."""
    if isinstance(out, Tensor):
        return make(out)
    if isinstance(out, (tuple, list)):
        return [each(o, make) for o in out]
    return None


def lost_if_none(channels: ChannelLabel, axes: ChannelLayout | None) -> ChannelLabel:
    """Filters mixed with something else have no layer any more."""
    return ChannelLabel(channels.origin, axes) if axes is not None else STOP


def pointwise(channels: ChannelLabel, x: Tensor, call: FunctionCall, label: Lookup) -> Any:
    """The first operand that is as large as the result; a smaller one is broadcast: scale, bias."""
    if isinstance(call.out, Tensor) and x.shape == call.out.shape:
        return aligned(channels, x, call.out)

    def one(result: Tensor) -> ChannelLabel:
        operands = [o for o in call.operands if channels_of(label, o)]
        full = [o for o in operands if o.shape == result.shape] or operands
        return aligned(channels_of(label, full[0]) or STOP, full[0], result)

    return each(call.out, one)


def where(channels: ChannelLabel, x: Tensor, call: FunctionCall, label: Lookup) -> Any:
    """The values go on, not the condition, unless that alone depends on the data."""
    condition = next((o for o in call.operands if o.dtype == torch.bool), None)
    values = [o for o in call.operands if o is not condition and channels_of(label, o)]
    if not values:
        return pointwise(channels, x, call, label)
    x = values[0]
    return choice(channels_of(label, x) or STOP, x, replace(call, operands=values), label)


def choice(channels: ChannelLabel, x: Tensor, call: FunctionCall, label: Lookup) -> Any:
    """Each element is that of one operand: a larger one, or one by a condition; or of each half."""
    found = pointwise(channels, x, call, label)
    if not isinstance(found, ChannelLabel):
        return found
    full = [value for value in call.operands if value.shape == call.out.shape]
    return of_one_layer(found, full, label, same_axes=False)


def of_one_layer(
    joined: ChannelLabel, pieces: Sequence[Tensor], label: Lookup, same_axes: bool
) -> ChannelLabel:
    """What is put together, or chosen from: of several layers, it is no one layer's.

    Args:
        joined: what the first piece would make of it.
        same_axes: whether filters have to lie in all of them as in the first.
    """
    found = [other for piece in pieces if (other := channels_of(label, piece)) is not None]
    found = [other for other in found if other.origin.kind != "none"]
    if len({other.origin.name for other in found}) > 1:
        return ChannelLabel(NOWHERE, joined.axes)
    if same_axes and len({other.axes for other in found}) > 1:
        return ChannelLabel(joined.origin)
    return joined


def aligned(channels: ChannelLabel, x: Tensor, result: Tensor) -> ChannelLabel:
    """Broadcasting aligns axes at the end; the filters must not be broadcast themselves."""
    axes = channels.axes
    if axes is None:
        return channels
    shape = result.shape
    more = len(shape) - x.dim()
    if more > 0:
        axes = axes.insert(0, more)
    if not axes.fit(shape):
        return STOP
    return (
        channels
        if axes is channels.axes and not channels.gathered
        else ChannelLabel(channels.origin, axes)
    )


def same_filters(channels: ChannelLabel, x: Tensor, call: FunctionCall, label: Lookup) -> Any:
    """Pooling, padding, resizing: other axes may change their size, filters stay."""
    return each(call.out, lambda o: aligned(channels, x, o) if o.dim() == x.dim() else STOP)


def kept_beside(
    dims: Container[int], channels: ChannelLabel, x: Tensor, call: FunctionCall, label: Lookup
) -> Any:
    """Filters that lie along one of the axes mix; else they stay."""
    if channels.axes is None or any(p.dim in dims for p in channels.axes.parts):
        return each(call.out, lambda _: STOP)
    return same_filters(channels, x, call, label)
