"""A rule for each torch function: what its results carry, given what its operands do.

The rules follow DESIGN section 1: from the nonlinearity back through norms, dropout, scale,
residual sums by their first operand, pooling, padding, changes of dtype and layout, and
reshapes and permutes that keep the filters apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fmapkit._axes import Axes
from fmapkit._nested import tensors_in
from fmapkit._origin import STOP, Flow, Lookup, Tag, flow_of
from fmapkit._vocabulary import (
    KEEP_SHAPE,
    LINEAR_BINARY,
    LINEAR_KEEPERS,
    NONLINEAR_POINTWISE,
    NORM_AXIS,
    PRODUCTS,
    REDUCTIONS,
    RESHAPES,
    words,
)

__all__ = ["RULES", "Rule", "each", "spatial"]

# Given the flow of the first operand that has one, that operand, the call's arguments, its result
# and what any tensor carries.
Rule = Callable[[Flow, Tensor, Any, Any, Any, Lookup], Any]


def each(out: Any, make: Callable[[Tensor], Tag]) -> Any:
    """What each tensor of a result carries, nested like the result."""
    if isinstance(out, Tensor):
        return make(out)
    if isinstance(out, (tuple, list)):
        return [each(o, make) for o in out]
    return None


def _lost_if_none(flow: Flow, axes: Axes | None) -> Flow:
    """Filters mixed with something else have no layer any more."""
    return Flow(flow.origin, axes) if axes is not None else STOP


def _pointwise(flow: Flow, x: Tensor, args: Any, kwargs: Any, out: Any, tag: Lookup) -> Any:
    """The first operand that is as large as the result; a smaller one is broadcast: scale, bias."""

    def one(result: Tensor) -> Flow:
        operands = [o for o in tensors_in(*args, kwargs) if flow_of(tag, o)]
        full = [o for o in operands if o.shape == result.shape] or operands
        return _aligned(flow_of(tag, full[0]) or STOP, full[0], result)

    return each(out, one)


def _aligned(flow: Flow, x: Tensor, result: Tensor) -> Flow:
    """Broadcasting aligns axes at the end; the filters must not be broadcast themselves."""
    if flow.axes is None:
        return flow
    axes = flow.axes.insert(0, result.dim() - x.dim()) if result.dim() > x.dim() else flow.axes
    fits = all(p.dim < result.dim() and result.shape[p.dim] == p.size for p in axes.parts)
    return Flow(flow.origin, axes) if fits else STOP


def _same_filters(flow: Flow, x: Tensor, args: Any, kwargs: Any, out: Any, tag: Lookup) -> Any:
    """Pooling, padding, resizing: other axes may change their size, filters stay."""
    return each(out, lambda o: _aligned(flow, x, o) if o.dim() == x.dim() else STOP)


def spatial(axes: str | None, pads: bool) -> Rule:
    """The same, but filters that lie along an axis which is pooled, padded or resized mix."""

    def rule(flow: Flow, x: Tensor, args: Any, kwargs: Any, out: Any, tag: Lookup) -> Any:
        if axes is not None:
            touched = int(axes)
        else:
            touched = max(x.dim() - 2, 0)
        dims = set(range(x.dim() - touched, x.dim()))
        padding = _argument(args, kwargs, 1, "pad") if pads else None
        if padding is not None:
            dims = {x.dim() - 1 - i // 2 for i, size in enumerate(padding) if size}
        if flow.axes is None or any(p.dim in dims for p in flow.axes.parts):
            return each(out, lambda _: STOP)
        return _same_filters(flow, x, args, kwargs, out, tag)

    return rule


def _pairs(flow: Flow, x: Tensor, args: Any, kwargs: Any, out: Any, tag: Lookup) -> Any:
    """Complex numbers as pairs along a last axis, and back: all other axes stay where they are."""
    axes, last = flow.axes, min(x.dim(), out.dim())
    if axes is None or any(p.dim >= last for p in axes.parts):
        return STOP
    return flow


def _reshape(flow: Flow, x: Tensor, args: Any, kwargs: Any, out: Any, tag: Lookup) -> Any:
    axes = flow.axes
    return each(
        out, lambda o: _lost_if_none(flow, axes and axes.reshape(tuple(x.shape), tuple(o.shape)))
    )


def _order(name: str, n: int, args: Any, kwargs: Any) -> list[int] | None:
    order: list[int] = list(range(n))
    if name in ("transpose", "swapaxes", "swapdims"):
        values: Sequence[Any] = [*args[1:], *kwargs.values()]
        a, b = (int(v) % n for v in values[:2])
        order[a], order[b] = order[b], order[a]
    elif name in ("permute",):
        values = kwargs.get("dims", args[1:])
        if len(values) == 1 and isinstance(values[0], (tuple, list)):
            values = values[0]
        order = [int(v) % n for v in values]
    elif name in ("t", "__get__.T", "__get__.mT", "__get__.H", "__get__.mH", "adjoint"):
        if name in ("__get__.T",):
            order.reverse()
        elif n >= 2:
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


def _permute(name: str) -> Rule:
    def rule(flow: Flow, x: Tensor, args: Any, kwargs: Any, out: Any, tag: Lookup) -> Any:
        order = _order(name, x.dim(), args, kwargs)
        if order is None or flow.axes is None:
            return Flow(flow.origin)
        return Flow(flow.origin, flow.axes.permute(order))

    return rule


def _argument(args: Sequence[Any], kwargs: dict[str, Any], place: int, *names: str) -> Any:
    for name in names:
        if name in kwargs:
            return kwargs[name]
    return args[place] if len(args) > place else None


def _reduce(flow: Flow, x: Tensor, args: Any, kwargs: Any, out: Any, tag: Lookup) -> Any:
    dims = _argument(args, kwargs, 1, "dim", "axis")
    if isinstance(dims, Tensor):  # torch.max(a, b), elementwise
        return _pointwise(flow, x, args, kwargs, out, tag)
    if isinstance(dims, int) and not isinstance(dims, bool):
        dims = [dims]
    if not isinstance(dims, (tuple, list)) or not dims:
        return each(out, lambda _: STOP)
    reduced = [int(d) % x.dim() for d in dims]
    axes = flow.axes
    if axes is None or any(p.dim in reduced and p.size > 1 for p in axes.parts):
        return each(out, lambda _: STOP)

    def one(o: Tensor) -> Flow:
        return (
            Flow(flow.origin, axes)
            if o.dim() == x.dim()
            else _lost_if_none(flow, axes.remove(reduced))
        )

    return each(out, one)


def _cut(name: str) -> Rule:
    """chunk, split and unbind: the parts in order; narrow and select: one of them."""

    def rule(flow: Flow, x: Tensor, args: Any, kwargs: Any, out: Any, tag: Lookup) -> Any:
        axes = flow.axes
        assert axes is not None
        place = {"unbind": 1, "narrow": 1, "select": 1}.get(name, 2)
        default = {"vsplit": 0, "dsplit": 2, "hsplit": 1 if x.dim() > 1 else 0}.get(name, 0)
        dim = _argument(args, kwargs, place, "dim", "axis")
        dim = (default if dim is None else int(dim)) % x.dim()
        if name == "select":
            index = int(_argument(args, kwargs, 2, "index"))
            return Flow(flow.origin, axes.select(dim, index % x.shape[dim]))
        if name == "narrow":
            start = int(_argument(args, kwargs, 2, "start"))
            return Flow(flow.origin, axes.slice(dim, start % x.shape[dim], out.shape[dim]))
        if name == "unbind":
            return [Flow(flow.origin, axes.select(dim, i)) for i in range(len(out))]
        flows, start = [], 0
        for piece in out:
            flows.append(Flow(flow.origin, axes.slice(dim, start, piece.shape[dim])))
            start += piece.shape[dim]
        return flows

    return rule


def _expand(flow: Flow, x: Tensor, args: Any, kwargs: Any, out: Any, tag: Lookup) -> Any:
    return each(out, lambda o: _aligned(flow, x, o))


def _along(name: str) -> Rule:
    """Functions that change the order within the axes they name: filters stay if not among them."""

    def rule(flow: Flow, x: Tensor, args: Any, kwargs: Any, out: Any, tag: Lookup) -> Any:
        place = 2 if name in ("roll", "take_along_dim") else 1
        dims = _argument(args, kwargs, place, "dims", "dim")
        dims = [dims] if isinstance(dims, int) else list(dims or range(x.dim()))
        touched = {int(d) % x.dim() for d in dims}
        axes = flow.axes
        if axes is None or any(p.dim in touched for p in axes.parts):
            return each(out, lambda _: STOP)
        return _same_filters(flow, x, args, kwargs, out, tag)

    return rule


def _cat(flow: Flow, x: Tensor, args: Any, kwargs: Any, out: Any, tag: Lookup) -> Any:
    """Along another axis the first operand's filters go on; along the filter axis they mix.

    But not where the pieces of one layer's filters are put together again as they were.
    """
    dim = int(_argument(args, kwargs, 1, "dim", "axis") or 0) % out.dim()
    axes = flow.axes
    pieces = tensors_in(args[0] if args else kwargs)
    if axes is None or len(pieces) == 1:
        return Flow(flow.origin, axes) if axes is not None else STOP
    if any(p.dim == dim for p in axes.parts):
        return _rejoined([flow_of(tag, piece) for piece in pieces], dim)
    return _aligned(flow, x, out)


def _rejoined(pieces: Sequence[Flow | None], dim: int) -> Flow:
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
    return Flow(first.origin, first.axes.slice(dim, 0, size))


def _fft(name: str) -> Rule:
    """Fourier transforms mix along the axes they name, by default the last one, two or all."""

    def rule(flow: Flow, x: Tensor, args: Any, kwargs: Any, out: Any, tag: Lookup) -> Any:
        dims = _argument(args, kwargs, 2, "dim")
        if dims is None and name == "fftn":
            sizes = _argument(args, kwargs, 1, "s")
            dims = range(-(x.dim() if sizes is None else len(sizes)), 0)
        elif dims is None:
            dims = (-1,) if name == "fft" else (-2, -1)
        touched = {d % x.dim() for d in ([dims] if isinstance(dims, int) else dims)}
        if flow.axes is None or any(p.dim in touched for p in flow.axes.parts):
            return each(out, lambda _: STOP)
        return _same_filters(flow, x, args, kwargs, out, tag)

    return rule


def _stack(flow: Flow, x: Tensor, args: Any, kwargs: Any, out: Any, tag: Lookup) -> Any:
    dim = int(_argument(args, kwargs, 1, "dim", "axis") or 0) % out.dim()
    return Flow(flow.origin, flow.axes.insert(dim)) if flow.axes is not None else STOP


def _getitem(flow: Flow, x: Tensor, args: Any, kwargs: Any, out: Any, tag: Lookup) -> Any:
    axes = _indexed(flow.axes, args[1], x) if flow.axes is not None else None
    if axes is None or any(p.dim >= out.dim() or out.shape[p.dim] != p.size for p in axes.parts):
        return STOP
    return Flow(flow.origin, axes)


def _indexed(axes: Axes | None, index: Any, x: Tensor) -> Axes | None:
    items = list(index) if isinstance(index, tuple) else [index]

    def width(item: Any) -> int:
        if item is None or item is Ellipsis:
            return 0
        return item.dim() if isinstance(item, Tensor) and item.dtype == torch.bool else 1

    advanced = [i for i in items if isinstance(i, (Tensor, list))]
    if len(advanced) > 1:
        return None
    at = 0  # the axis of the result that the next item makes
    if Ellipsis not in [i for i in items if not isinstance(i, Tensor)]:
        items.append(Ellipsis)
    for item in items:
        if axes is None:
            return None
        if item is None:
            axes = axes.insert(at)
            at += 1
        elif item is Ellipsis:
            at += x.dim() - sum(width(i) for i in items)
        elif isinstance(item, slice):
            part = next((p for p in axes.parts if p.dim == at), None)
            if part is not None:
                start, stop, step = item.indices(part.size)
                size = len(range(start, stop, step))
                axes = axes.slice(at, start, size, step)
            at += 1
        elif isinstance(item, Tensor) and item.dtype == torch.bool:
            gone = list(range(at, at + item.dim()))
            if any(p.dim in gone for p in axes.parts):
                return None
            removed = axes.remove(gone)
            axes = removed.insert(at) if removed is not None else None
            at += 1
        elif isinstance(item, (Tensor, list)):
            rank = item.dim() if isinstance(item, Tensor) else 1
            if any(p.dim == at for p in axes.parts):
                return None
            removed = axes.remove([at])
            axes = removed.insert(at, rank) if removed is not None else None
            at += rank
        elif isinstance(item, bool):
            return None
        else:
            axes = axes.select(at, int(item))
    return axes


def _index_select(flow: Flow, x: Tensor, args: Any, kwargs: Any, out: Any, tag: Lookup) -> Any:
    dim = int(_argument(args, kwargs, 1, "dim")) % x.dim()
    axes = flow.axes
    if axes is None or any(p.dim == dim for p in axes.parts):
        return STOP
    return _same_filters(flow, x, args, kwargs, out, tag)


def _write(flow: Flow, x: Tensor, args: Any, kwargs: Any, out: Any, tag: Lookup) -> Any:
    """copy_, index assignment and the like: what self carried, or else what is written into it."""
    target = args[0]
    own = flow_of(tag, target)
    return (
        own if own is not None else _aligned(flow, x, target) if (x.dim() <= target.dim()) else STOP
    )


def _copy(flow: Flow, x: Tensor, args: Any, kwargs: Any, out: Any, tag: Lookup) -> Any:
    source = _argument(args, kwargs, 1, "src", "source")
    found = flow_of(tag, source)
    return _aligned(found, source, args[0]) if found is not None else None


RULES: dict[str, Rule] = {
    **dict.fromkeys(LINEAR_KEEPERS | LINEAR_BINARY | PRODUCTS | NONLINEAR_POINTWISE, _pointwise),
    **dict.fromkeys(["view_as_real", "view_as_complex"], _pairs),
    **dict.fromkeys(KEEP_SHAPE | frozenset(NORM_AXIS), _same_filters),
    **dict.fromkeys(RESHAPES, _reshape),
    **{
        name: _permute(name)
        for name in words(
            """transpose swapaxes swapdims permute t __get__.T __get__.mT __get__.H __get__.mH
            adjoint movedim moveaxis"""
        )
    },
    **dict.fromkeys(REDUCTIONS, _reduce),
    **{
        name: _cut(name)
        for name in words(
            """chunk split split_with_sizes tensor_split unsafe_chunk unsafe_split unbind narrow
            select hsplit vsplit dsplit"""
        )
    },
    **dict.fromkeys(words("expand expand_as broadcast_to repeat tile repeat_interleave"), _expand),
    "roll": _along("roll"),
    "flip": _along("flip"),
    **dict.fromkeys(["cat", "concat", "concatenate"], _cat),
    "stack": _stack,
    "__getitem__": _getitem,
    "index_select": _index_select,
    "gather": _along("gather"),
    "take_along_dim": _along("take_along_dim"),
    **{
        f"fft_{kind}fft{n}": _fft(f"fft{n}")
        for kind in ("", "i", "r", "ir", "h", "ih")
        for n in ("", "2", "n")
    },
    "cumsum": _along("cumsum"),
    "cumprod": _along("cumprod"),
    **dict.fromkeys(
        words("__setitem__ index_add index_copy index_put scatter scatter_add masked_scatter"),
        _write,
    ),
    "copy": _copy,
}
