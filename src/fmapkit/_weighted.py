"""Which torch function is a layer: what it weights its input with, and where its filters lie."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from torch import Tensor, nn

from fmapkit._axes import Axes, Part
from fmapkit._nested import tensors_in
from fmapkit._origin import Flow, Lookup, Weight
from fmapkit._vocabulary import BIAS_FIRST, CONV, GROUPED, MATMULS

__all__ = ["input_place", "layer_axes", "pads_first", "weighs", "weight_operand", "weight_slice"]

_PRODUCTS = MATMULS | {"einsum", "tensordot"}


@cache
def weighs(name: str) -> str:
    """In which form a function takes its weight; empty where no call of it is a layer."""
    if name in _PRODUCTS:
        return "product"
    if name in ("linear", "bilinear"):
        return name
    return "conv" if CONV.fullmatch(name) else ""


def weight_operand(
    name: str,
    operands: Sequence[Tensor],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    tag: Lookup,
) -> Any:
    """The weight of a weighted function; None where the function weights nothing.

    Convolutions, `linear` and `bilinear` always have one. A product has one where exactly one of
    its factors is computed from parameters and another one is not.
    """
    how = weighs(name)
    if how == "product":
        factors = _factors(name, operands)
        weights = [f for f in factors if isinstance(tag(f), Weight)]
        if len(weights) == 1 and any(isinstance(tag(f), Flow) for f in factors):
            return weights[0]
        return None
    place = 2 if how == "bilinear" else 1
    return kwargs.get("weight", args[place] if len(args) > place else None) if how else None


def _factors(name: str, operands: Sequence[Tensor]) -> Sequence[Tensor]:
    if name in GROUPED:
        return operands[:2]
    return operands[1:] if name in BIAS_FIRST else operands


def input_place(name: str, operands: Sequence[Tensor], weight: Any) -> int | None:
    """Which of a weighted function's tensor arguments is its input; None if it has none."""
    for place in range(1 if name in BIAS_FIRST else 0, len(operands)):
        if operands[place] is not weight:
            return place
    return None


def pads_first(module: nn.Module) -> bool:
    """Whether its forward is that of torch's convolutions, with a call of `pad` before the other.

    What enters such a layer is what the module is given, not what its convolution is.
    """
    if type(module).forward.__module__ != "torch.nn.modules.conv":
        return False
    return bool(module.padding_mode != "zeros")


def layer_axes(name: str, args: Sequence[Any], weight: Any, out: Tensor) -> Axes | None:
    """The filter axis of what a weighted function returns."""
    how = weighs(name)
    if how == "conv":
        dim = out.dim() - (weight.dim() - 2) - 1
    elif how == "linear":
        dim = out.dim() - 1
    elif name == "einsum":
        found = _einsum_axis(args, weight)
        if found is None:
            return None
        dim = found
    elif name == "tensordot":
        dim = out.dim() - 1
    elif name in MATMULS and weight.dim() >= 2 and out.dim() >= 2:
        factors = [a for a in args if isinstance(a, Tensor)]
        factors = factors[:2] if name in GROUPED else factors[-2:]
        if name == "__rmatmul__":
            factors.reverse()
        dim = out.dim() - 1 if factors and factors[-1] is weight else out.dim() - 2
    else:
        dim = out.dim() - 1
    if not 0 <= dim < out.dim():
        return None
    return Axes.single(dim, out.shape[dim])


def weight_slice(tag: Weight, weight: Tensor, axes: Axes | None) -> Axes | None:
    """The filters of a layer whose weight is a slice of a parameter, by the parameter's rows.

    Where the weight has all of the parameter's values its filters are all of the parameter's; where
    it is another part than a slice of rows, its filters cannot be told, and None says so.
    """
    if axes is None or weight.numel() == tag.parameter.numel():
        return axes
    rows, made = tag.axes, axes.parts[0]
    if rows is None or rows.dim != 0 or rows.parts[0].size != made.size:
        return None
    return Axes((Part(made.dim, made.size, rows.parts[0].stride),), rows.offset)


def _einsum_axis(args: Sequence[Any], weight: Any) -> int | None:
    """The last index of the output that comes from the weight alone."""
    equation = args[0] if args and isinstance(args[0], str) else ""
    left, arrow, right = equation.replace(" ", "").partition("->")
    operands = tensors_in(*args[1:])
    terms = left.split(",")
    if not arrow or "." in equation or len(terms) != len(operands):
        return None
    of_weight = {i for t, o in zip(terms, operands, strict=True) if o is weight for i in t}
    of_others = {i for t, o in zip(terms, operands, strict=True) if o is not weight for i in t}
    own = [d for d, i in enumerate(right) if i in of_weight - of_others]
    return own[-1] if len(own) == 1 else None
