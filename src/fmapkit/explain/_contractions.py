"""Products that sum over an axis: matrix products and convolutions.

A term of such a sum counts unless its other factor is a constant 0: a weight that a mask has set to
zero, the probability of a position that attention may not see.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fmapkit.explain._fields import NONE, Call, Rule, least, lowest, varies


def _terms(call: Call, value: Tensor) -> Tensor:
    """Where a factor is no constant 0."""
    return (value != 0) | varies(call.of(value), value)


def _mixed(field: Tensor, terms: Tensor) -> Tensor:
    """The field of sums over the last axis.

    Args:
        field: (R, n, K); of many (R, b, n, K), where all terms count.
        terms: (m, K), which of the K terms each of m sums has.

    Returns:
        (R, n, m).
    """
    if bool(terms.all()):
        found = lowest(field, [field.dim() - 2])
        return found.expand(*found.shape[:-1], terms.shape[-2])
    kinds, which = torch.unique(terms, dim=0, return_inverse=True)
    sums = [torch.where(kind, field, NONE).amin(-1) for kind in kinds]
    return torch.stack(sums, -1)[..., which]


def _product(call: Call, one: Tensor, other: Tensor) -> Tensor | None:
    """Of a matrix product (n, k) × (k, m), or of many, (b, n, k) × (b, k, m)."""
    if one.shape[-1] == 0:
        return None
    left, right = call.of(one), call.of(other)
    fields = []
    for field, terms, back in (
        (left, _terms(call, other).mT, False),
        (None if right is None else right.mT, _terms(call, one), True),
    ):
        if field is None:
            continue
        if terms.dim() == 2 or bool(terms.all()):
            found = _mixed(field, terms)
        else:
            found = torch.stack([_mixed(field[:, b], terms[b]) for b in range(len(terms))], 1)
        fields.append(found.mT if back else found)
    return least(fields, (*one.shape[:-1], other.shape[-1]))


def _mm(call: Call) -> list[Tensor | None]:
    """A matrix product, or many; `addmm` and `baddbmm` add it to something."""
    one, other = call.get("mat1", "batch1", "self"), call.get("mat2", "batch2")
    found = _product(call, one, other) if call.get("alpha", default=1) != 0 else None
    added = call.of(call.given["self"]) if call.get("beta", default=0) != 0 else None
    return [least([found, added], call.results[0].shape)]


# -- convolutions ---------------------------------------------------------------------------


def _convolution(call: Call) -> list[Tensor | None]:
    value, weight = call.get("input", "self"), call.given["weight"]
    transposed = bool(call.get("transposed", default=False))
    result, groups = call.results[0], call.get("groups", default=1)
    lead = value.dim() - (weight.dim() - 2) - 1  # 1, or 0 of one sample alone
    field, fields = call.of(value), []
    if field is not None:
        field = field if lead else field.unsqueeze(1)
        terms = _terms(call, weight)
        shape = (len(field), field.shape[1], *result.shape[lead:])
        found = _slid(call, field, terms, groups, transposed, shape)
        fields.append(found if lead else found.squeeze(1))
    wide = [-1, *[1] * (weight.dim() - 2)]
    own = call.of(weight)
    if own is not None:
        kept = 1 if transposed else 0
        own = lowest(own, [a for a in range(weight.dim()) if a != kept])
        own = own.reshape(len(own), -1)
        fields.append((own.repeat(1, groups) if transposed else own).reshape(len(own), *wide))
    bias = call.of(call.get("bias"))
    if bias is not None:
        fields.append(bias.reshape(len(bias), *wide))
    return [least(fields, result.shape)]


def _slid(
    call: Call, field: Tensor, terms: Tensor, groups: int, transposed: bool, shape: Sequence[int]
) -> Tensor:
    """The input's part in a convolution: (R, N, out, *places)."""
    kernel, places, outs = terms.shape[2:], shape[3:], shape[2] // groups
    strides, paddings, dilations = (
        _each(call.get(name, default=default), len(kernel))
        for name, default in (("stride", 1), ("padding", 0), ("dilation", 1))
    )
    apart = field.reshape(*field.shape[:2], groups, -1, *field.shape[3:])
    by_group = terms.reshape(groups, -1, *terms.shape[1:])  # (groups, out, in, *kernel)
    if transposed:  # a convolution, of an input that is set apart, with the kernel reversed
        by_group = by_group.transpose(1, 2).flip([3 + axis for axis in range(len(kernel))])
        for axis, stride in enumerate(strides):
            apart = _set_apart(apart, 4 + axis, stride)
        ends = zip(dilations, kernel, paddings, strict=True)
        paddings = [dilation * (size - 1) - padding for dilation, size, padding in ends]
        strides = [1] * len(kernel)
    steps = list(zip(strides, paddings, dilations, places, strict=True))
    if bool(terms.all()):  # every output channel sees the same
        found = apart.amin(3)
        for axis, size in enumerate(kernel):
            found = _gathered(found, 3 + axis, range(size), steps[axis])
        wide = found.unsqueeze(3).expand(-1, -1, -1, outs, *places)
        return wide.reshape(*shape)
    found = field.new_full((*field.shape[:2], groups, outs, *places), NONE)
    for offset in itertools.product(*map(range, kernel)):
        tap: Any = (..., *offset)
        there = by_group[tap]
        if not bool(there.any()):
            continue
        moved = apart
        for axis, at in enumerate(offset):
            moved = _gathered(moved, 4 + axis, [at], steps[axis])
        for group in range(groups):
            flat = moved[:, :, group].movedim(2, -1).flatten(1, -2)
            mixed = _mixed(flat, there[group])
            mixed = mixed.reshape(*field.shape[:2], *places, outs).movedim(-1, 2)
            found[:, :, group] = torch.minimum(found[:, :, group], mixed)
    return found.reshape(*shape)


def _each(value: Any, axes: int) -> list[int]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * axes if len(values) == 1 else values


def _gathered(
    field: Tensor, axis: int, taps: Sequence[int], steps: tuple[int, int, int, int]
) -> Tensor:
    """Along one axis, the field of what each place of a convolution reads."""
    stride, padding, dilation, places = steps  # places are those of the result
    reach = dilation * max(taps) + 1
    after = max(0, (places - 1) * stride + reach - padding - field.shape[axis])
    padded = F.pad(field.movedim(axis, -1), (padding, after), value=NONE)
    read = padded.unfold(-1, reach, stride)[..., :places, [tap * dilation for tap in taps]]
    return read.amin(-1).movedim(-1, axis)


def _set_apart(field: Tensor, axis: int, stride: int) -> Tensor:
    """Along one axis, each element followed by `stride - 1` that nothing reaches."""
    apart = F.pad(field.movedim(axis, -1).unsqueeze(-1), (0, stride - 1), value=NONE)
    return apart.flatten(-2).movedim(-1, axis)


# The operators of each rule.
RULES: dict[Rule, str] = {
    _mm: "mm bmm addmm baddbmm",
    _convolution: "convolution _convolution cudnn_convolution",
}
