"""A rule for each torch function: what its results carry, given what its operands do.

Labels go through norms, dropout, scale, residual sums by their first operand, pooling, padding,
changes of dtype and layout, `cat` and `stack`, `split` and `chunk`, and through reshapes and
permutes that keep the filters apart. Indices are in `index_rules.py`; `RULES` below has every
function.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fmapkit.errors import is_int
from fmapkit.provenance.index_rules import getitem, write
from fmapkit.provenance.labels import STOP, ChannelLabel, Lookup, channels_of
from fmapkit.provenance.layout import ChannelLayout
from fmapkit.provenance.rule_basics import (
    FunctionCall,
    Rule,
    aligned,
    choice,
    each,
    kept_beside,
    lost_if_none,
    of_one_layer,
    pointwise,
    same_filters,
    where,
)
from fmapkit.provenance.vocabulary import (
    BIAS_FIRST,
    GROUPED,
    KEEP_SHAPE,
    LINEAR_BINARY,
    LINEAR_KEEPERS,
    MATMULS,
    NONLINEAR_POINTWISE,
    NORM_AXIS,
    PRODUCTS,
    REDUCTIONS,
    RESHAPES,
    SPATIAL,
    WRITES,
    words,
)
from fmapkit.torchlib.nested import tensors_in


def spatial(channels: ChannelLabel, x: Tensor, call: FunctionCall, label: Lookup) -> Any:
    """The same, but filters that lie along an axis which is pooled, padded or resized mix."""
    found = SPATIAL.fullmatch(call.name)
    axes = found.group("axes") if found is not None else None
    touched = int(axes) if axes is not None else max(x.dim() - 2, 0)
    dims = set(range(x.dim() - touched, x.dim()))
    padding = call.argument(1, "pad") if "pad" in call.name else None
    if padding is not None:
        dims = {x.dim() - 1 - i // 2 for i, size in enumerate(padding) if size}
    return kept_beside(dims, channels, x, call, label)


def _reshape(channels: ChannelLabel, x: Tensor, call: FunctionCall, label: Lookup) -> Any:
    axes, shape = channels.axes, tuple(x.shape)
    return each(
        call.out, lambda o: lost_if_none(channels, axes and axes.reshape(shape, tuple(o.shape)))
    )


def _order(name: str, n: int, args: Any, kwargs: Any) -> list[int]:
    order: list[int] = list(range(n))
    if name in ("transpose", "swapaxes", "swapdims"):
        values: Sequence[Any] = [*args[1:], *kwargs.values()]
        a, b = (int(v) % n for v in values[:2])
        order[a], order[b] = order[b], order[a]
    elif name == "permute":
        values = kwargs.get("dims", args[1:])
        if len(values) == 1 and isinstance(values[0], (tuple, list)):
            values = values[0]
        order = [int(v) % n for v in values]
    elif name == "__get__.T":
        order.reverse()
    elif name in ("t", "__get__.mT", "__get__.H", "__get__.mH", "adjoint"):
        if n >= 2:
            order[-1], order[-2] = order[-2], order[-1]
    else:  # movedim, moveaxis
        values = [*args[1:], *kwargs.values()]
        source, target = (
            [int(d) % n for d in (v if isinstance(v, (tuple, list)) else [v])] for v in values[:2]
        )
        rest = iter([d for d in range(n) if d not in source])
        where = dict(zip(target, source, strict=True))
        order = [where[d] if d in where else next(rest) for d in range(n)]
    return order


def _permute(channels: ChannelLabel, x: Tensor, call: FunctionCall, label: Lookup) -> Any:
    assert channels.axes is not None
    order = _order(call.name, x.dim(), call.args, call.kwargs)
    return ChannelLabel(channels.origin, channels.axes.permute(order))


def _reduce(channels: ChannelLabel, x: Tensor, call: FunctionCall, label: Lookup) -> Any:
    dims = call.argument(1, "dim", "axis")
    if isinstance(dims, Tensor):  # torch.max(a, b), elementwise
        return choice(channels, x, call, label)
    if is_int(dims):
        dims = [dims]
    if not isinstance(dims, (tuple, list)) or not dims:
        return each(call.out, lambda _: STOP)
    reduced = [int(d) % x.dim() for d in dims]
    axes = channels.axes
    if axes is None or any(p.dim in reduced and p.size > 1 for p in axes.parts):
        return each(call.out, lambda _: STOP)

    less = axes.remove(reduced)
    return each(call.out, lambda o: lost_if_none(channels, axes if o.dim() == x.dim() else less))


def _cut(channels: ChannelLabel, x: Tensor, call: FunctionCall, label: Lookup) -> Any:
    """chunk, split and unbind: the parts in order; narrow and select: one of them."""
    name, out, axes = call.name, call.out, channels.axes
    assert axes is not None
    place = {"unbind": 1, "narrow": 1, "select": 1}.get(name, 2)
    default = {"vsplit": 0, "dsplit": 2, "hsplit": 1 if x.dim() > 1 else 0}.get(name, 0)
    dim = call.argument(place, "dim", "axis")
    dim = (default if dim is None else int(dim)) % x.dim()
    if name == "select":
        index = int(call.argument(2, "index"))
        return ChannelLabel(channels.origin, axes.select(dim, index % x.shape[dim]))
    if name == "narrow":
        start = int(call.argument(2, "start"))
        return ChannelLabel(channels.origin, axes.slice(dim, start % x.shape[dim], out.shape[dim]))
    if name == "unbind":
        return [ChannelLabel(channels.origin, axes.select(dim, i)) for i in range(len(out))]
    channel_labels, start = [], 0
    for piece in out:
        channel_labels.append(
            ChannelLabel(channels.origin, axes.slice(dim, start, piece.shape[dim]))
        )
        start += piece.shape[dim]
    return channel_labels


def _expand(channels: ChannelLabel, x: Tensor, call: FunctionCall, label: Lookup) -> Any:
    return each(call.out, lambda o: aligned(channels, x, o))


def _along(channels: ChannelLabel, x: Tensor, call: FunctionCall, label: Lookup) -> Any:
    """Functions that change the order within the axes they name: filters stay if not among them."""
    dims = call.argument(2 if call.name in ("roll", "take_along_dim") else 1, "dims", "dim")
    dims = [dims] if isinstance(dims, int) else list(dims or range(x.dim()))
    return kept_beside({int(d) % x.dim() for d in dims}, channels, x, call, label)


def _cat(channels: ChannelLabel, x: Tensor, call: FunctionCall, label: Lookup) -> Any:
    """Along another axis the first operand's filters go on; along the filter axis they mix.

    But not where the pieces of one layer's filters are put together again as they were.
    """
    dim = int(call.argument(1, "dim", "axis") or 0) % call.out.dim()
    axes = channels.axes
    pieces = tensors_in(call.args[0] if call.args else call.kwargs)
    if axes is None or len(pieces) == 1:
        return ChannelLabel(channels.origin, axes) if axes is not None else STOP
    if any(p.dim == dim for p in axes.parts):
        return _rejoined([channels_of(label, piece) for piece in pieces], dim)
    return of_one_layer(aligned(channels, x, call.out), pieces, label, same_axes=True)


def _rejoined(pieces: Sequence[ChannelLabel | None], dim: int) -> ChannelLabel:
    """Filters that were split, and lie one after the other again."""
    first, size = pieces[0], 0
    for piece in pieces:
        if first is None or first.axes is None or piece is None or piece.axes is None:
            return STOP
        part = next((p for p in piece.axes.parts if p.dim == dim), None)
        if part is None or first.origin.kind == "none" or piece.origin is not first.origin:
            return STOP
        if piece.axes != first.axes.slice(dim, size, part.size):
            return STOP
        size += part.size
    assert first is not None and first.axes is not None
    return ChannelLabel(first.origin, first.axes.slice(dim, 0, size))


def _fft(channels: ChannelLabel, x: Tensor, call: FunctionCall, label: Lookup) -> Any:
    """Fourier transforms mix along the axes they name, by default the last one, two or all."""
    dims = call.argument(2, "dim")
    if dims is None and call.name.endswith("n"):
        sizes = call.argument(1, "s")
        dims = range(-(x.dim() if sizes is None else len(sizes)), 0)
    elif dims is None:
        dims = (-2, -1) if call.name.endswith("2") else (-1,)
    touched = {d % x.dim() for d in ([dims] if isinstance(dims, int) else dims)}
    return kept_beside(touched, channels, x, call, label)


def _stack(channels: ChannelLabel, x: Tensor, call: FunctionCall, label: Lookup) -> Any:
    dim = int(call.argument(1, "dim", "axis") or 0) % call.out.dim()
    if channels.axes is None:
        return STOP
    pieces = tensors_in(call.args[0] if call.args else call.kwargs)
    joined = ChannelLabel(channels.origin, channels.axes.insert(dim))
    return of_one_layer(joined, pieces, label, same_axes=True)


def _copy(channels: ChannelLabel, x: Tensor, call: FunctionCall, label: Lookup) -> Any:
    source = call.argument(1, "src", "source")
    found = channels_of(label, source)
    return aligned(found, source, call.args[0]) if found is not None else None


def _pairs(channels: ChannelLabel, x: Tensor, call: FunctionCall, label: Lookup) -> Any:
    """Complex numbers as pairs of real ones, and back: an axis at the end comes or goes."""
    axes = channels.axes
    return STOP if axes is None or any(p.dim >= call.out.dim() for p in axes.parts) else channels


# -- products without a weight, and sums over runs of rows: a graph's messages --------------------
#
# Axes that are not summed stay. Whose filters they are is known where one factor alone has some.


def product(channels: ChannelLabel, x: Tensor, call: FunctionCall, label: Lookup) -> Any:
    """A matrix product."""
    out, operands = call.out, call.operands
    first = channels_of(label, operands[0])
    if call.name in BIAS_FIRST and first is not None and operands[0].shape == out.shape:
        return first
    a, b = operands[-2:]
    if call.name == "__rmatmul__":
        a, b = b, a
    left = _unsummed(channels_of(label, a), a, -1, b.dim() == 1, out)
    right = _unsummed(channels_of(label, b), b, -2, a.dim() == 1, out)
    return STOP if left and right else left or right or STOP


def _unsummed(
    channels: ChannelLabel | None, x: Tensor, summed: int, vector: bool, out: Tensor
) -> ChannelLabel | None:
    """What is left of a factor's filters.

    Args:
        summed: the axis that is summed, counted from the end.
        vector: the other factor is one, so the result has no axis for it.
    """
    if channels is None or channels.axes is None or not channels.axes.parts or x.dim() + summed < 0:
        return None
    parts = []
    for part in channels.axes.parts:
        at = part.dim - x.dim()
        if at == summed:
            return None
        # Axes before the one that goes count one less from the end.
        dim = out.dim() + at + (vector and at < summed)
        if not 0 <= dim < out.dim() or out.shape[dim] != part.size:
            return None
        parts.append(part.at(dim))
    return ChannelLabel(channels.origin, ChannelLayout(tuple(parts), channels.axes.offset))


def einsum(channels: ChannelLabel, x: Tensor, call: FunctionCall, label: Lookup) -> Any:
    """The same, by the letters; factors that are multiplied place by place are the first one's."""
    terms, right = einsum_terms(call.args)
    if len(terms) != len(call.operands):
        return STOP
    found: list[tuple[str, ChannelLabel]] = []
    for term, operand in zip(terms, call.operands, strict=True):
        own = channels_of(label, operand)
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


def segments(channels: ChannelLabel, x: Tensor, call: FunctionCall, label: Lookup) -> Any:
    """Runs of rows are summed; filters that lie along another axis stay."""
    axis = call.kwargs.get("axis", 0) % x.dim()
    return kept_beside([axis], channels, x, call, label)


RULES: dict[str, Rule] = {
    **dict.fromkeys(LINEAR_KEEPERS | LINEAR_BINARY | PRODUCTS | NONLINEAR_POINTWISE, pointwise),
    **dict.fromkeys(KEEP_SHAPE | frozenset(NORM_AXIS), same_filters),
    **dict.fromkeys(RESHAPES, _reshape),
    **dict.fromkeys(
        words(
            """transpose swapaxes swapdims permute t __get__.T __get__.mT __get__.H __get__.mH
            adjoint movedim moveaxis"""
        ),
        _permute,
    ),
    **dict.fromkeys(REDUCTIONS, _reduce),
    **dict.fromkeys(
        words(
            """chunk split split_with_sizes tensor_split unsafe_chunk unsafe_split unbind narrow
            select hsplit vsplit dsplit"""
        ),
        _cut,
    ),
    **dict.fromkeys(words("expand expand_as broadcast_to repeat tile repeat_interleave"), _expand),
    **dict.fromkeys(words("roll flip index_select gather take_along_dim cumsum cumprod"), _along),
    **dict.fromkeys(["cat", "concat", "concatenate"], _cat),
    "stack": _stack,
    "__getitem__": getitem,
    **dict.fromkeys(
        [f"fft_{k}fft{n}" for k in ("", "i", "r", "ir", "h", "ih") for n in ("", "2", "n")], _fft
    ),
    **dict.fromkeys(WRITES, write),
    "copy": _copy,
    **dict.fromkeys(MATMULS - {GROUPED, "addbmm"}, product),
    "einsum": einsum,
    "segment_reduce": segments,
    "where": where,
    **dict.fromkeys(words("tril triu index_fill fill_diagonal _weight_norm"), pointwise),
    **dict.fromkeys(words("maximum minimum fmax fmin complex polar"), choice),
    **dict.fromkeys(words("view_as_real view_as_complex"), _pairs),
}
