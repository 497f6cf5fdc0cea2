"""Which torch function is a layer: what it weights its input with, and where its filters lie."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fmapkit.layers import layer_axis
from fmapkit.provenance.labels import ChannelLabel, Label, Lookup, ParamLabel
from fmapkit.provenance.layout import ChannelAxis, ChannelLayout
from fmapkit.provenance.rule_basics import FunctionCall
from fmapkit.provenance.rules import einsum_terms
from fmapkit.provenance.vocabulary import BIAS_FIRST, CONV, GROUPED, MATMULS

_PRODUCTS = MATMULS | {"einsum", "tensordot"}
# Operators whose weights are packed into objects that are no tensors: such a layer goes by the
# module that runs, or by the place where that module keeps the object.
_QUANTIZED = ("quantized", "_quantized", "onednn", "sparse")
_PACKED = re.compile(r"(q?linear|conv(_transpose)?(?P<axes>[123])d)(_dynamic)?(_fp16)?")
_WITH_SIGMA = re.compile(r".*_(relu|leaky_relu|tanh)(_dynamic)?(_fp16)?(_out|_output_fp32)?")


@cache
def weighs(name: str) -> str:
    """In which form a function takes its weight; empty where no call of it is a layer."""
    if name in _PRODUCTS:
        return "product"
    if name in ("linear", "bilinear"):
        return name
    return "conv" if CONV.fullmatch(name) else ""


def weight_operand(call: FunctionCall, label: Lookup) -> Any:
    """The weight of a weighted function; None where the function weights nothing.

    Convolutions, `linear` and `bilinear` always have one. A product has one where exactly one of
    its factors is computed from parameters and another one is not.
    """
    how = weighs(call.name)
    if how == "product":
        factors = _factors(call)
        weights = [f for f in factors if isinstance(label(f), ParamLabel)]
        if len(weights) == 1 and any(isinstance(label(f), ChannelLabel) for f in factors):
            return weights[0]
        return None
    place = 2 if how == "bilinear" else 1
    return call.argument(place, "weight") if how else None


def bias_operand(call: FunctionCall) -> Any:
    """The bias of a weighted function; None where it is given none."""
    if call.name in BIAS_FIRST:
        return call.operands[0]
    how = weighs(call.name)
    return None if how == "product" else call.argument(3 if how == "bilinear" else 2, "bias")


def _factors(call: FunctionCall) -> Sequence[Tensor]:
    if call.name == GROUPED:
        return call.operands[:2]
    return call.operands[1:] if call.name in BIAS_FIRST else call.operands


def input_place(call: FunctionCall, weight: Any) -> int | None:
    """Which of a weighted function's tensor arguments is its input; None if it has none."""
    for place in range(1 if call.name in BIAS_FIRST else 0, len(call.operands)):
        if call.operands[place] is not weight:
            return place
    return None


def pads_first(module: nn.Module) -> bool:
    """Whether its forward is that of torch's convolutions, with a call of `pad` before the other.

    What enters such a layer is what the module is given, not what its convolution is.
    """
    if type(module).forward.__module__ != "torch.nn.modules.conv":
        return False
    return bool(module.padding_mode != "zeros")


def layer_axes(call: FunctionCall, weight: Tensor, label: Label) -> ChannelLayout | None:
    """Where the filters lie in what a weighted function returns, by the parameter's numbering.

    Args:
        label: what the weight carries. Of a slice of a parameter, the filters are that slice's;
            they cannot be told where it is not known which slice it is, or where rows of several
            layers lie together.
    """
    places, out = filter_places(call, weight), call.out
    if not places:
        return None
    if isinstance(label, ParamLabel) and not (label.parameter is weight and len(places) == 1):
        return _of_parameter(label, weight, out, places)
    return ChannelLayout.single(places[0][0], out.shape[places[0][0]]) if len(places) == 1 else None


def _of_parameter(
    label: ParamLabel, weight: Tensor, out: Tensor, places: Sequence[tuple[int, int]]
) -> ChannelLayout | None:
    """The filters of a layer whose weight is made of a parameter; places as in `filter_places`."""
    shape = tuple(label.parameter.shape)
    unknown = len(label.axes) < len(shape) or None in label.axes
    if unknown and not _complete(label, weight, [w for _, w in places]):
        return None
    parts: list[ChannelAxis] = []
    offset, stride = 0, 1
    for size, axes in zip(reversed(shape), reversed(label.axes), strict=False):
        mine = [(o, p) for p in axes.parts for o, w in places if w == p.dim] if axes else []
        if mine and axes is not None:
            parts += [ChannelAxis(o, p.size, p.stride * stride) for o, p in mine]
            offset += axes.offset * stride
            stride *= size
    there = {p.dim: p.size for p in parts}
    if not all(there.get(o, 1) == out.shape[o] for o, _ in places):
        # Of a transposed convolution with groups, or a part on this rank.
        whole = weight.numel() == label.parameter.numel() and len(there) == len(places) == 1
        return ChannelLayout.single(places[0][0], out.shape[places[0][0]]) if whole else None
    return ChannelLayout(tuple(sorted(parts, key=lambda p: p.dim)), offset) if parts else None


def _complete(label: ParamLabel, weight: Tensor, used: Sequence[int]) -> bool:
    """Whether what is not known of a weight leaves its filters what they are.

    Nothing is left out of the parameter, or only along an axis that is summed.
    """
    rest, seen = label.parameter.numel(), set(used)
    for size, axes in zip(label.parameter.shape, label.axes, strict=False):
        if axes is not None:
            seen.update(p.dim for p in axes.parts)
            rest = rest // max(size, 1) * math.prod(p.size for p in axes.parts)
    return rest == weight.numel() or len(seen) < weight.dim()


def picked(name: str, label: ParamLabel, weight: Tensor) -> str:
    """Which of the weights that are stacked in a parameter this is, as an index: `[3]`, `[:, 2]`.

    Empty where it is no such pick.
    """
    found = []
    for size, axes in zip(label.parameter.shape, label.axes, strict=False):
        one = axes is not None and math.prod(p.size for p in axes.parts) == 1 < size
        # A slice of one: of a stack, that is one of its weights; else it is one filter.
        stacked = axes is not None and all(
            name in MATMULS and p.dim < weight.dim() - 2 for p in axes.parts
        )
        found.append(str(axes.offset) if axes is not None and one and stacked else ":")
    while found and found[-1] == ":":
        found.pop()
    return f"[{', '.join(found)}]" if found else ""


def filter_places(call: FunctionCall, weight: Tensor) -> list[tuple[int, int]]:
    """The axes of a weighted function's result that count filters: pairs with the weight's axes.

    These are the axes that the weight alone has; and before them, of a stack of weights, the one
    that tells these apart. Empty where the filters cannot be told.
    """
    name = call.name
    n, m = call.out.dim(), weight.dim()
    how = weighs(name)
    if name == "conv_tbc":  # (time, batch, channels), by a weight (kernel, in, filters)
        return [(n - 1, 2)] if n == m == 3 else []
    if how == "conv":
        dim = n - (m - 2) - 1
        return [(dim, 1 if "transpose" in name else 0)] if dim >= 0 else []
    if how in ("linear", "bilinear"):
        return [(n - 1, 0)] if n and m > 1 else []
    if name == "einsum":
        return _einsum_places(call, weight)
    factors = _factors(call)[:2]
    if name == "tensordot":
        return _tensordot_places(call, weight) if factors[-1] is weight else []
    if m < 2 or (name == GROUPED and weight.shape[0] > 1):
        return []  # a vector; rows of several layers one after the other
    right = (factors[-1] is weight) != (name == "__rmatmul__")
    other = factors[0] if factors[-1] is weight else factors[-1]
    vector = other.dim() == 1  # for which the result has no axis
    at = n - 1 if right or vector else n - 2
    if name == "addbmm" or at < 0:
        return []
    stack = [(n - 2 + vector - i, m - 2 - i) for i in range(1, m - 1)]
    stack = [(o, w) for o, w in stack if o >= 0 and weight.shape[w] > 1]
    return [*stack, (at, m - 1 if right else m - 2)] if name != GROUPED else [(at, m - 1)]


def _tensordot_places(call: FunctionCall, weight: Tensor) -> list[tuple[int, int]]:
    """What is left of the weight comes last."""
    dims = call.argument(2, "dims")
    if isinstance(dims, int):
        left = list(range(dims, weight.dim()))
    elif isinstance(dims, (tuple, list)) and isinstance(dims[1], (tuple, list)):
        gone = {d % weight.dim() for d in dims[1]}
        left = [d for d in range(weight.dim()) if d not in gone]
    else:
        return []
    return [(call.out.dim() - len(left) + i, d) for i, d in enumerate(left)]


def _einsum_places(call: FunctionCall, weight: Tensor) -> list[tuple[int, int]]:
    """The letters that the result has of the weight alone, and those of a stack that begin it."""
    operands, (terms, right) = call.operands, einsum_terms(call.args)
    if len(terms) != len(operands):
        return []
    term = next((t for t, o in zip(terms, operands, strict=True) if o is weight), "")
    others = "".join([t for t, o in zip(terms, operands, strict=True) if o is not weight])
    own = [i for i in term if i in right and i not in others]
    stack = list(itertools.takewhile(lambda i: i in right and i in others, term))
    return [(right.index(i), term.index(i)) for i in (*stack, *own)] if own else []


# -- torch's quantised operators ------------------------------------------------------------------


def _quantized_name(function: Any) -> str | None:
    packet = getattr(function, "overloadpacket", function)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return None
    space, _, name = packet._qualified_op_name.partition("::")
    return name if space in _QUANTIZED else None


def is_weighted(function: Any) -> bool:
    """Whether a torch function is a quantised layer, and nothing else."""
    name = _quantized_name(function)
    return name is not None and _PACKED.fullmatch(name) is not None


def is_fused(function: Any) -> bool:
    """Whether a torch function is a quantised one with a nonlinearity inside."""
    name = _quantized_name(function)
    return name is not None and "_cell_" not in name and _WITH_SIGMA.fullmatch(name) is not None


def packed_axes(function: Any, out: Tensor) -> ChannelLayout | None:
    """The filter axis of what a quantised layer returns."""
    found = _PACKED.fullmatch(_quantized_name(function) or "")
    spatial = int(found.group("axes") or 0) if found is not None else 0
    dim = out.dim() - 1 - spatial
    return ChannelLayout.single(dim, out.shape[dim]) if dim >= 0 else None


def packed_key(module: nn.Module, weight: Any) -> str | None:
    """Where the running module keeps a packed weight; "" if it is that layer; None if nowhere."""
    if layer_axis(module) is not None:
        return ""
    return next((key for key, value in vars(module).items() if value is weight), None)
