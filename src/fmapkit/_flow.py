"""Follow the data: whose filters a tensor carries, after each torch function.

Every tensor that depends on the model's input has a `Flow`: where its filters come from (`Origin`)
and how they lie in it (`Axes`). A tensor computed from parameters alone is a `Weight`. The rules
here say, for one torch function, what its results carry. A function without a rule stops the
flow: its result has no layer behind it. A label is never guessed.

The rules follow DESIGN section 1: from the nonlinearity back through norms, dropout, scale,
residual sums by their first operand, pooling, padding, changes of dtype and layout, and
reshapes and permutes that keep the filters apart.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fmapkit._axes import Axes, Part

__all__ = ["Flow", "Origin", "Weight", "function_name", "tensors_in"]


class Origin:
    """Where filters come from: one call of a layer, of a norm, or nothing that has filters.

    Compared by identity: two calls are two origins.
    """

    __slots__ = ("call", "claimed", "kind", "name")

    def __init__(self, kind: str, name: str = "", call: int = 0) -> None:
        self.kind = kind  # "layer", "norm" or "none"
        self.name = name
        self.call = call
        self.claimed = False  # a nonlinearity has received these filters

    def __repr__(self) -> str:
        return f"<{self.kind} {self.name}#{self.call}>"


NOWHERE = Origin("none")


@dataclass(frozen=True, slots=True)
class Flow:
    """What a tensor carries: filters of `origin`, lying along `axes`."""

    origin: Origin
    axes: Axes | None = None


STOP = Flow(NOWHERE)


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter, or a tensor computed from parameters only.

    `axes` follows the parameter's first axis: which of its rows a slice of it has.
    """

    parameter: Tensor
    axes: Axes | None = None


def function_name(function: Any) -> str:
    """The name of a function: `torch.relu`, `Tensor.relu` and `aten.relu.default` share it."""
    name: str = getattr(function, "__name__", "")
    if name in ("__get__", "__set__"):
        owner = getattr(function, "__self__", None)
        return f"{name}.{getattr(owner, '__name__', '')}"
    return name.split(".")[0]


def tensors_in(*values: Any) -> list[Tensor]:
    """Every tensor in nested tuples, lists and dicts, in order."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            if value:
                found += tensors_in(*value)
        elif isinstance(value, dict) and value:
            found += tensors_in(*value.values())
    return found


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Names without the "_" of in-place forms. The sets below are torch's own vocabulary.
METADATA = _words(
    """size dim stride numel nelement element_size is_contiguous storage_offset data_ptr
    untyped_storage storage is_floating_point is_complex get_device __len__ ndimension
    is_pinned is_shared is_inference is_conj is_neg has_names is_same_size __bool__ __repr__
    __format__ __hash__ item tolist __int__ __float__ __index__ __contains__ is_nonzero
    backward register_hook register_post_accumulate_grad_hook retain_grad is_tensor iscomplexobj
    __deepcopy__ __reduce_ex__ __array__ numpy allclose equal is_set_to
    _is_view is_signed result_type finfo iinfo"""
)
FRESH = _words(
    """zeros_like ones_like empty_like full_like rand_like randn_like randint_like new_zeros
    new_ones new_empty new_full new_tensor zeros ones empty full rand randn randint arange
    linspace tensor as_tensor eye bernoulli"""
)
LINEAR_KEEPERS = _words(
    """to type float half bfloat16 double contiguous clone detach alias requires_grad type_as
    positive neg negative cpu cuda native_dropout dropout alpha_dropout feature_dropout
    feature_alpha_dropout dropout1d dropout2d dropout3d view_as_real conj resolve_conj
    resolve_neg lift_fresh pin_memory nan_to_num _to_copy __get__.data __get__.real
    checkpoint_name"""
)
DROPOUTS = _words(
    """dropout alpha_dropout feature_dropout feature_alpha_dropout native_dropout dropout1d
    dropout2d dropout3d bernoulli rand_like randn_like"""
)
LINEAR_BINARY = _words("add sub subtract rsub __rsub__ lerp")
PRODUCTS = _words("mul multiply div divide true_divide __rdiv__ __rtruediv__ addcmul addcdiv")
NONLINEAR_POINTWISE = _words(
    """abs absolute exp exp2 expm1 log log2 log10 log1p sqrt rsqrt square pow __pow__ __rpow__
    reciprocal sign sgn floor ceil round trunc frac clamp clamp_min clamp_max clip erf erfc erfinv
    sin cos tan asin acos atan sinh cosh asinh acosh atan2 maximum minimum fmax fmin where
    masked_fill fmod remainder floor_divide heaviside logit logaddexp logaddexp2 hypot xlogy
    float_power gt lt ge le eq ne greater less greater_equal less_equal isnan isinf isfinite
    logical_not logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_not
    fake_quantize_per_tensor_affine fake_quantize_per_channel_affine"""
)
KEEP_SHAPE = _words("softmax log_softmax _softmax local_response_norm normalize")
# Batch, group and instance norms count filters along axis 1, layer and rms norms along the last.
NORM_AXIS = dict.fromkeys(
    _words(
        """batch_norm group_norm instance_norm native_batch_norm native_group_norm
        _batch_norm_impl_index cudnn_batch_norm local_response_norm sync_batch_norm"""
    ),
    1,
) | dict.fromkeys(["layer_norm", "rms_norm", "native_layer_norm", "fused_layer_norm"], -1)
SPATIAL = re.compile(
    r"(adaptive_|fractional_)?(max|avg|lp)_(un)?pool(?P<axes>[123])d(_with_indices)?"
    r"|pad|constant_pad_nd|re(flect|plic)(ion|ation)_pad[123]d|interpolate|upsample\w*|grid_sample"
)
RESHAPES = _words(
    "view reshape flatten unflatten squeeze unsqueeze view_as reshape_as _unsafe_view ravel"
)
REDUCTIONS = _words(
    "mean sum amax amin max min std var logsumexp norm prod any all nanmean nansum median mode"
)
CONV = re.compile(r"_?conv(_transpose)?([123]d|olution)|conv_tbc|mkldnn_convolution")
_BIAS_FIRST = ("addmm", "addbmm", "baddbmm", "addmv")  # products that take the bias first
# Where a product may have its weight; the first operand that is one decides.
MATMULS = _words("matmul mm bmm __matmul__ __rmatmul__ mv addmm addbmm baddbmm addmv")

# What runs several nonlinearities in one call that nobody can look into.
OPAQUE = {
    "lstm": "torch.lstm runs its gates inside one fused call",
    "gru": "torch.gru runs its gates inside one fused call",
    "rnn_tanh": "torch.rnn_tanh runs its nonlinearity inside one fused call",
    "rnn_relu": "torch.rnn_relu runs its nonlinearity inside one fused call",
    "lstm_cell": "torch.lstm_cell runs its gates inside one fused call",
    "gru_cell": "torch.gru_cell runs its gates inside one fused call",
    "rnn_tanh_cell": "torch.rnn_tanh_cell runs its nonlinearity inside one fused call",
    "rnn_relu_cell": "torch.rnn_relu_cell runs its nonlinearity inside one fused call",
    "quantized_lstm": "a quantized lstm runs its gates inside one fused call",
    "quantized_gru": "a quantized gru runs its gates inside one fused call",
    "_transformer_encoder_layer_fwd": "the fused encoder layer runs its nonlinearity inside",
    "_native_multi_head_attention": "the fused attention runs its projections inside",
}

Tag = Flow | Weight | None
Lookup = Callable[[Any], Tag]


def _flow(tag: Lookup, value: Any) -> Flow | None:
    found = tag(value)
    return found if isinstance(found, Flow) else None


def weight_operand(name: str, args: Sequence[Any], kwargs: dict[str, Any], tag: Lookup) -> Any:
    """The weight of a weighted function; None where the function weights nothing.

    Convolutions, `linear` and `bilinear` always have one. A product has one where exactly one of
    its factors is computed from parameters and another one is not.
    """
    if CONV.fullmatch(name) or name == "linear":
        return kwargs.get("weight", args[1] if len(args) > 1 else None)
    if name == "bilinear":
        return kwargs.get("weight", args[2] if len(args) > 2 else None)
    if name in MATMULS or name in ("einsum", "tensordot"):
        factors = tensors_in(*args, kwargs)
        if name in _BIAS_FIRST:
            factors = factors[1:]
        weights = [f for f in factors if isinstance(tag(f), Weight)]
        if len(weights) == 1 and any(isinstance(tag(f), Flow) for f in factors):
            return weights[0]
    return None


def input_place(name: str, args: Any, kwargs: dict[str, Any], weight: Any) -> int | None:
    """Which of a weighted function's tensor arguments is its input; None if it has none."""
    operands = tensors_in(*args, kwargs)
    places = range(1 if name in _BIAS_FIRST else 0, len(operands))
    return next((i for i in places if operands[i] is not weight), None)


def layer_axes(name: str, args: Sequence[Any], weight: Any, out: Tensor) -> Axes | None:
    """The filter axis of what a weighted function returns."""
    if CONV.fullmatch(name):
        dim = out.dim() - (weight.dim() - 2) - 1
    elif name == "einsum":
        found = _einsum_axis(args, weight)
        if found is None:
            return None
        dim = found
    elif name == "tensordot":
        dim = out.dim() - 1
    elif name in MATMULS and weight.dim() >= 2 and out.dim() >= 2:
        factors = [a for a in args if isinstance(a, Tensor)][-2:]
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


def carried(name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any, tag: Lookup) -> Any:
    """What the results of an unweighted function carry.

    Args:
        name: of the function, without the "_" of an in-place form.
        args: its positional arguments.
        kwargs: its keyword arguments.
        out: what it returned.
        tag: what a tensor carries.

    Returns:
        For a tensor, its tag; for a tuple or list of them, a list of tags; None for no change.
    """
    if name in METADATA or name in FRESH:
        return None
    operands = tensors_in(*args, kwargs)
    flows = [(o, f) for o in operands if (f := _flow(tag, o)) is not None]
    if not flows:
        return _of_weights(name, args, kwargs, out, operands, tag)
    x, flow = flows[0]
    rule = _RULES.get(name)
    if rule is None and (found := SPATIAL.fullmatch(name)):
        rule = _spatial(found.group("axes"), pads="pad" in name)
    if rule is None:
        return _each(out, lambda _: STOP)
    if name in ("cat", "concat", "concatenate", "stack"):
        return rule(flow, x, args, kwargs, out, tag)
    if flow.axes is None and name not in _CHOOSE_OPERAND:
        return _each(out, lambda _: Flow(flow.origin))
    return rule(flow, x, args, kwargs, out, tag)


def _of_weights(
    name: str, args: Any, kwargs: Any, out: Any, operands: list[Tensor], tag: Lookup
) -> Any:
    """What a function of parameters alone returns: a weight, its rows followed like filters."""
    weights = [(o, w) for o in operands if isinstance(w := tag(o), Weight)]
    if not weights:
        return None
    x, weight = weights[0]
    rule = _RULES.get(name)
    rows: Any = None
    if weight.axes is not None and rule is not None and len(weights) == 1:
        flow = Flow(NOWHERE, weight.axes)
        rows = rule(flow, x, args, kwargs, out, lambda t: flow if t is x else None)

    def one(found: Any) -> Weight:
        return Weight(weight.parameter, found.axes if isinstance(found, Flow) else None)

    if isinstance(rows, list):
        return [one(r) for r in rows]
    return _each(out, lambda _: one(rows))


def _each(out: Any, make: Callable[[Tensor], Tag]) -> Any:
    if isinstance(out, Tensor):
        return make(out)
    if isinstance(out, (tuple, list)):
        return [_each(o, make) for o in out]
    return None


def _lost_if_none(flow: Flow, axes: Axes | None) -> Flow:
    """Filters mixed with something else have no layer any more."""
    return Flow(flow.origin, axes) if axes is not None else STOP


def _pointwise(flow: Flow, x: Tensor, args: Any, kwargs: Any, out: Any, tag: Lookup) -> Any:
    """The first operand that is as large as the result; a smaller one is broadcast: scale, bias."""

    def one(result: Tensor) -> Flow:
        operands = [o for o in tensors_in(*args, kwargs) if _flow(tag, o)]
        full = [o for o in operands if o.shape == result.shape] or operands
        return _aligned(_flow(tag, full[0]) or STOP, full[0], result)

    return _each(out, one)


def _aligned(flow: Flow, x: Tensor, result: Tensor) -> Flow:
    """Broadcasting aligns axes at the end; the filters must not be broadcast themselves."""
    if flow.axes is None:
        return flow
    axes = flow.axes.insert(0, result.dim() - x.dim()) if result.dim() > x.dim() else flow.axes
    fits = all(p.dim < result.dim() and result.shape[p.dim] == p.size for p in axes.parts)
    return Flow(flow.origin, axes) if fits else STOP


def _same_filters(flow: Flow, x: Tensor, args: Any, kwargs: Any, out: Any, tag: Lookup) -> Any:
    """Pooling, padding, resizing: other axes may change their size, filters stay."""
    return _each(out, lambda o: _aligned(flow, x, o) if o.dim() == x.dim() else STOP)


def _spatial(axes: str | None, pads: bool) -> Any:
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
            return _each(out, lambda _: STOP)
        return _same_filters(flow, x, args, kwargs, out, tag)

    return rule


def _reshape(flow: Flow, x: Tensor, args: Any, kwargs: Any, out: Any, tag: Lookup) -> Any:
    axes = flow.axes
    return _each(
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


def _permute(name: str) -> Any:
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
        return _each(out, lambda _: STOP)
    reduced = [int(d) % x.dim() for d in dims]
    axes = flow.axes
    if axes is None or any(p.dim in reduced and p.size > 1 for p in axes.parts):
        return _each(out, lambda _: STOP)

    def one(o: Tensor) -> Flow:
        return (
            Flow(flow.origin, axes)
            if o.dim() == x.dim()
            else _lost_if_none(flow, axes.remove(reduced))
        )

    return _each(out, one)


def _cut(name: str) -> Any:
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
    return _each(out, lambda o: _aligned(flow, x, o))


def _along(name: str) -> Any:
    """Functions that change the order within the axes they name: filters stay if not among them."""

    def rule(flow: Flow, x: Tensor, args: Any, kwargs: Any, out: Any, tag: Lookup) -> Any:
        place = 2 if name in ("roll", "take_along_dim") else 1
        dims = _argument(args, kwargs, place, "dims", "dim")
        dims = [dims] if isinstance(dims, int) else list(dims or range(x.dim()))
        touched = {int(d) % x.dim() for d in dims}
        axes = flow.axes
        if axes is None or any(p.dim in touched for p in axes.parts):
            return _each(out, lambda _: STOP)
        return _same_filters(flow, x, args, kwargs, out, tag)

    return rule


def _cat(flow: Flow, x: Tensor, args: Any, kwargs: Any, out: Any, tag: Lookup) -> Any:
    """Along another axis the first operand's filters go on; along the filter axis they mix."""
    dim = int(_argument(args, kwargs, 1, "dim", "axis") or 0) % out.dim()
    axes = flow.axes
    pieces = tensors_in(args[0] if args else kwargs)
    if axes is None or len(pieces) == 1:
        return Flow(flow.origin, axes) if axes is not None else STOP
    if any(p.dim == dim for p in axes.parts):
        return STOP
    return _aligned(flow, x, out)


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
    own = _flow(tag, target)
    return (
        own if own is not None else _aligned(flow, x, target) if (x.dim() <= target.dim()) else STOP
    )


def _copy(flow: Flow, x: Tensor, args: Any, kwargs: Any, out: Any, tag: Lookup) -> Any:
    source = _argument(args, kwargs, 1, "src", "source")
    found = _flow(tag, source)
    return _aligned(found, source, args[0]) if found is not None else None


_RULES: dict[str, Any] = {
    **dict.fromkeys(LINEAR_KEEPERS | LINEAR_BINARY | PRODUCTS | NONLINEAR_POINTWISE, _pointwise),
    **dict.fromkeys(KEEP_SHAPE | frozenset(NORM_AXIS), _same_filters),
    **dict.fromkeys(RESHAPES, _reshape),
    **{
        name: _permute(name)
        for name in _words(
            """transpose swapaxes swapdims permute t __get__.T __get__.mT __get__.H __get__.mH
            adjoint movedim moveaxis"""
        )
    },
    **dict.fromkeys(REDUCTIONS, _reduce),
    **{
        name: _cut(name)
        for name in _words(
            """chunk split split_with_sizes tensor_split unsafe_chunk unsafe_split unbind narrow
            select hsplit vsplit dsplit"""
        )
    },
    **dict.fromkeys(_words("expand expand_as broadcast_to repeat tile repeat_interleave"), _expand),
    "roll": _along("roll"),
    "flip": _along("flip"),
    **dict.fromkeys(["cat", "concat", "concatenate"], _cat),
    "stack": _stack,
    "__getitem__": _getitem,
    "index_select": _index_select,
    "gather": _along("gather"),
    "take_along_dim": _along("take_along_dim"),
    "cumsum": _along("cumsum"),
    "cumprod": _along("cumprod"),
    "as_strided": None,
    **dict.fromkeys(
        _words("__setitem__ index_add index_copy index_put scatter scatter_add masked_scatter"),
        _write,
    ),
    "copy": _copy,
    "set": None,
}
_RULES = {name: rule for name, rule in _RULES.items() if rule is not None}
_CHOOSE_OPERAND = (
    LINEAR_BINARY | PRODUCTS | NONLINEAR_POINTWISE | {"copy", "__setitem__", "max", "min"}
)
