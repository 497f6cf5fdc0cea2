"""Follow the data: whose filters a tensor carries, after each torch function.

Every tensor that depends on the model's input has a `Flow`: where its filters come from (`Origin`)
and how they lie in it (`Axes`). A tensor computed from parameters alone is a `Weight`. Here a rule
is chosen for one call of a torch function (`_flow_rules.py` has them all). A function without a
rule stops the flow: its result has no layer behind it. A label is never guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from torch import Tensor

from fmapkit._axes import Axes
from fmapkit._flow_rules import RULES, Rule, each, spatial
from fmapkit._origin import NOWHERE, STOP, Flow, Lookup, Tag, Weight
from fmapkit._vocabulary import (
    FRESH,
    LINEAR_BINARY,
    METADATA,
    NONLINEAR_POINTWISE,
    PRODUCTS,
    SPATIAL,
)

__all__ = ["carried", "past_sigma", "sigma_axes"]

# Their results are numbers, or as good as new.
_NO_CHANGE = METADATA | FRESH
# The rules of these say themselves which operand's filters go on.
_CHOOSE_OPERAND = (
    (LINEAR_BINARY | PRODUCTS | NONLINEAR_POINTWISE)
    | {"copy", "__setitem__", "max", "min"}
    | {"cat", "concat", "concatenate", "stack"}
)


def carried(
    name: str,
    operands: Sequence[Tensor],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    out: Any,
    tag: Lookup,
) -> Any:
    """What the results of an unweighted function carry.

    Args:
        name: of the function, without the "_" of an in-place form.
        operands: all tensors among its arguments.
        args: its positional arguments.
        kwargs: its keyword arguments.
        out: what it returned.
        tag: what a tensor carries.

    Returns:
        For a tensor, its tag; for a tuple or list of them, a list of tags; None for no change.
    """
    if name in _NO_CHANGE:
        return None
    weights: list[tuple[Tensor, Weight]] = []
    for x in operands:
        flow = tag(x)
        if isinstance(flow, Flow):
            break
        if flow is not None:
            weights.append((x, flow))
    else:
        return _of_weights(name, args, kwargs, out, weights) if weights else None
    rule = _rule(name)
    if rule is None:
        return each(out, lambda _: STOP)
    if flow.axes is None and name not in _CHOOSE_OPERAND:
        return each(out, lambda _: flow)
    return rule(flow, x, args, kwargs, out, tag)


@cache
def _rule(name: str) -> Rule | None:
    """The rule of a function; None where there is none."""
    found = SPATIAL.fullmatch(name)
    if found is not None and name not in RULES:
        return spatial(found.group("axes"), pads="pad" in name)
    return RULES.get(name)


def _of_weights(
    name: str, args: Any, kwargs: Any, out: Any, weights: list[tuple[Tensor, Weight]]
) -> Any:
    """What a function of parameters alone returns: a weight, its rows followed like filters."""
    x, weight = weights[0]
    rule = RULES.get(name)
    rows: Any = None
    if weight.axes is not None and rule is not None and len(weights) == 1:
        flow = Flow(NOWHERE, weight.axes)
        rows = rule(flow, x, args, kwargs, out, lambda t: flow if t is x else None)

    def one(found: Any) -> Weight:
        return Weight(weight.parameter, found.axes if isinstance(found, Flow) else None)

    if isinstance(rows, list):
        return [one(r) for r in rows]
    return each(out, lambda _: one(rows))


def sigma_axes(axes: Axes | None, z: Tensor, a: Any) -> Axes | None:
    """σ keeps the filters; `glu` halves them."""
    if axes is None or not isinstance(a, Tensor) or a.dim() != z.dim():
        return None
    for part in axes.parts:
        if a.shape[part.dim] != part.size:
            axes = axes.slice(part.dim, 0, a.shape[part.dim])
    return axes


def past_sigma(tag: Tag, z: Tensor, a: Any) -> Flow | Weight:
    """What a = σ(z) carries, given what z does: filters that are no layer's, counted from 0.

    Of a parameter, it is as much a weight as the parameter itself.
    """
    axes = sigma_axes(tag.axes, z, a) if tag is not None else None
    if isinstance(tag, Weight):
        return Weight(tag.parameter, axes)
    if axes is None or len(axes.parts) != 1:
        return STOP
    part = axes.parts[0]
    return Flow(NOWHERE, Axes.single(part.dim, part.size))
