"""Rules for products without a weight, and for sums over runs of rows: a graph's messages.

Axes that are not summed stay. Whose filters they are is known where only one factor has some left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fmapkit.provenance.function_call import FunctionCall
from fmapkit.provenance.labels import STOP, ChannelLabel, Lookup, flow_of
from fmapkit.provenance.layout import ChannelLayout
from fmapkit.provenance.rule_basics import kept_beside
from fmapkit.provenance.vocabulary import BIAS_FIRST


def product(flow: ChannelLabel, x: Tensor, call: FunctionCall, tag: Lookup) -> Any:
    """A matrix product."""
    out, operands = call.out, call.operands
    first = flow_of(tag, operands[0])
    if call.name in BIAS_FIRST and first is not None and operands[0].shape == out.shape:
        return first
    a, b = operands[-2:]
    if call.name == "__rmatmul__":
        a, b = b, a
    left = _unsummed(flow_of(tag, a), a, -1, b.dim() == 1, out)
    right = _unsummed(flow_of(tag, b), b, -2, a.dim() == 1, out)
    return STOP if left and right else left or right or STOP


def _unsummed(
    flow: ChannelLabel | None, x: Tensor, summed: int, vector: bool, out: Tensor
) -> ChannelLabel | None:
    """What is left of a factor's filters.

    Args:
        summed: the axis that is summed, counted from the end.
        vector: the other factor is one, so the result has no axis for it.
    """
    if flow is None or flow.axes is None or not flow.axes.parts or x.dim() + summed < 0:
        return None
    parts = []
    for part in flow.axes.parts:
        at = part.dim - x.dim()
        if at == summed:
            return None
        # Axes before the one that goes count one less from the end.
        dim = out.dim() + at + (vector and at < summed)
        if not 0 <= dim < out.dim() or out.shape[dim] != part.size:
            return None
        parts.append(part.at(dim))
    return ChannelLabel(flow.origin, ChannelLayout(tuple(parts), flow.axes.offset))


def einsum(flow: ChannelLabel, x: Tensor, call: FunctionCall, tag: Lookup) -> Any:
    """The same, by the letters; factors that are multiplied place by place are the first one's."""
    terms, right = einsum_terms(call.args)
    if len(terms) != len(call.operands):
        return STOP
    found: list[tuple[str, ChannelLabel]] = []
    for term, operand in zip(terms, call.operands, strict=True):
        own = flow_of(tag, operand)
        if own is None or own.axes is None or not own.axes.parts:
            continue
        letters = "".join([term[p.dim] for p in own.axes.parts])
        if all(right.count(i) == 1 for i in letters):
            dims = map(right.index, letters)
            parts = [p.at(d) for p, d in zip(own.axes.parts, dims, strict=True)]
            axes = ChannelLayout(tuple(sorted(parts, key=lambda p: p.dim)), own.axes.offset)
            found.append((letters, ChannelLabel(own.origin, axes)))
    return found[0][1] if len({letters for letters, _ in found}) == 1 else STOP


def einsum_terms(args: Sequence[Any]) -> tuple[list[str], str]:
    """The letters of each operand of an einsum, and of its result; none where they are not said."""
    equation = args[0] if args and isinstance(args[0], str) else "."
    left, arrow, right = equation.replace(" ", "").partition("->")
    if "." in equation:
        return [], ""
    if not arrow:  # those that come once, in the order of the alphabet
        letters = left.replace(",", "")
        right = "".join(sorted(i for i in letters if letters.count(i) == 1))
    return left.split(","), right


def segments(flow: ChannelLabel, x: Tensor, call: FunctionCall, tag: Lookup) -> Any:
    """Runs of rows are summed; filters that lie along another axis stay."""
    axis = call.kwargs.get("axis", 0) % x.dim()
    return kept_beside([axis], flow, x, call, tag)
