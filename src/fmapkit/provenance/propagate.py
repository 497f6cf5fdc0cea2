"""Follow the data: whose filters a tensor carries, after each torch function.

Every tensor that depends on the model's input has a `ChannelLabel`: where its filters come from
(`Origin`) and how they lie in it (`ChannelLayout`). A tensor computed from parameters alone is a
`ParamLabel`. Here a rule is chosen for one call of a torch function (`provenance/rules.py` has them
all). A function without a rule stops the flow: its result has no layer behind it. A label is never
guessed.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

from torch import Tensor

from fmapkit.provenance.index_rules import is_number
from fmapkit.provenance.labels import (
    NOWHERE,
    STOP,
    ChannelLabel,
    Label,
    Lookup,
    ParamLabel,
    channels_of,
)
from fmapkit.provenance.layout import ChannelLayout
from fmapkit.provenance.rule_basics import FunctionCall, Rule, each
from fmapkit.provenance.rules import RULES, spatial
from fmapkit.provenance.vocabulary import (
    FRESH,
    LINEAR_BINARY,
    MATMULS,
    METADATA,
    NONLINEAR_POINTWISE,
    PICKS,
    PRODUCTS,
    SPATIAL,
    WRITES,
)

# Their results are numbers, or as good as new.
_NO_CHANGE = METADATA | FRESH
# The rules of these say themselves which operand's filters go on.
_CHOOSE_OPERAND = (
    (LINEAR_BINARY | PRODUCTS | NONLINEAR_POINTWISE | WRITES | MATMULS)
    | {"copy", "max", "min", "einsum"}
    | {"cat", "concat", "concatenate", "stack"}
)


def propagate(call: FunctionCall, label: Lookup) -> Any:
    """What the results of an unweighted function carry.

    For a tensor, its tag; for a tuple or list of them, a list of tags; None for no change.
    """
    name, operands = call.name, call.operands
    if name in _NO_CHANGE:
        return None
    if name in PICKS:
        source, others = operands[:1], operands[1:]
        if (
            others
            and not channels_of(label, source[0])
            and any(channels_of(label, o) for o in others)
        ):
            return _picked_by_data(call, source[0], label)
        operands = source
    weight: tuple[Tensor, ParamLabel] | None = None
    for x in operands:
        channels = label(x)
        if isinstance(channels, ChannelLabel):
            break
        if weight is None and channels is not None:
            weight = x, channels
    else:
        return None if weight is None else _of_weights(call, *weight)
    rule = _rule(name)
    if rule is None:
        return each(call.out, lambda _: STOP)
    if channels.axes is None and name not in _CHOOSE_OPERAND:
        kept = ChannelLabel(channels.origin) if channels.gathered else channels
        return each(call.out, lambda _: kept)
    return rule(channels, x, call, label)


@cache
def _rule(name: str) -> Rule | None:
    """The rule of a function; None where there is none."""
    return RULES.get(name) or (spatial if SPATIAL.fullmatch(name) else None)


def _of_weights(call: FunctionCall, x: Tensor, weight: ParamLabel) -> Any:
    """What a function of parameters alone returns: a weight, its axes followed like filters.

    `x` is the first of them.
    """
    rule, out = _rule(call.name), call.out

    def followed(axes: ChannelLayout | None) -> Any:
        if axes is None or rule is None:
            return None
        channels = ChannelLabel(NOWHERE, axes)
        return rule(channels, x, call, lambda t: channels if t is x else None)

    found = [followed(axes) for axes in (*weight.axes, weight.values)]
    shape = tuple(weight.parameter.shape)
    by_value = weight.by_value or (call.name in PICKS and any(map(is_number, call.operands)))

    def one(place: int | None) -> ParamLabel:
        of = [f[place] if isinstance(f, list) and place is not None else f for f in found]
        *axes, values = [f.axes if isinstance(f, ChannelLabel) else None for f in of]
        if None in axes and values is not None:
            return ParamLabel(weight.parameter, values.split(shape), values, by_value)
        return ParamLabel(weight.parameter, tuple(axes), values, by_value)

    if isinstance(out, (tuple, list)):
        return [one(i) for i in range(len(out))]
    return each(out, lambda _: one(None))


def _picked_by_data(call: FunctionCall, source: Tensor, label: Lookup) -> Any:
    """What data has picked: rows of a table are data themselves, one of many weights is a weight.

    Weights are stacked along the first axis of a parameter that has an axis more than they have.
    """
    weight, out = label(source), call.out
    if isinstance(weight, ParamLabel) and isinstance(out, Tensor) and out.dim() >= 2:
        shape = weight.parameter.shape
        found = _of_weights(call, source, weight)
        stacked = len(shape) > 2 and shape[0] > 1 and isinstance(found, ParamLabel)
        if stacked and len(found.axes) == len(shape) and None not in found.axes[1:]:
            return found
    return each(out, lambda _: STOP)


def sigma_axes(axes: ChannelLayout | None, z: Tensor, a: Any) -> ChannelLayout | None:
    """σ keeps the filters; `glu` halves them."""
    if axes is None or not isinstance(a, Tensor) or a.dim() != z.dim():
        return None
    for part in axes.parts:
        if a.shape[part.dim] != part.size:
            axes = axes.slice(part.dim, 0, a.shape[part.dim])
    return axes


def past_sigma(label: Label, z: Tensor, a: Any) -> ChannelLabel | ParamLabel:
    """What a = σ(z) carries, given what z does: filters that are no layer's, counted from 0.

    Of a parameter, it is as much a weight as the parameter itself.
    """
    if isinstance(label, ParamLabel):
        of_each = tuple([sigma_axes(axes, z, a) for axes in label.axes])
        return replace(label, axes=of_each, values=sigma_axes(label.values, z, a))
    axes = sigma_axes(label.axes, z, a) if label is not None else None
    if axes is None or len(axes.parts) != 1:
        return STOP
    part = axes.parts[0]
    return ChannelLabel(NOWHERE, ChannelLayout.single(part.dim, part.size))
