"""The rule of each operator: what its results depend on, given what its operands do.

No operator needs one: `_probe.py` finds out what any of them does, by exchanging values. A rule
says the same at once. Tests hold each rule to what the probe finds.

What cannot matter is left out, exactly: a factor that is a constant 0, a choice that a constant
mask makes, a score that is masked out. So a masked convolution and causal attention see what they
see.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fmapkit.explain import _contractions as contractions
from fmapkit.explain import _moves as moves
from fmapkit.explain._fields import NONE, Call, Rule, broadcast, least, lowest, varies
from fmapkit.explain._probe import probe

# A score that is this far below the largest is masked: the -10000 of models in half precision, say.
# (What is masked with -inf or the lowest number of a dtype is a constant, and needs no such rule.)
MASKED = 1000.0


def rule_for(call: Call) -> Rule:
    """The rule of an operator; the probe, if there is none."""
    if call.function.namespace != "aten" or call.name.startswith("_foreach"):
        return probe
    return _RULES.get(call.name, _pointwise if torch.Tag.pointwise in call.function.tags else probe)


def _pointwise(call: Call) -> list[Tensor | None]:
    """Each element from those at its place."""
    found = least([call.of(t) for t in call.operands], call.results[0].shape)
    return [least([found], r.shape) for r in call.results]


def _kept(call: Call, parts: Sequence[tuple[Any, Tensor | bool]]) -> list[Tensor | None]:
    """Pointwise: of each operand, what matters only where something holds."""
    shape = call.results[0].shape
    fields = []
    for operand, where in parts:
        one = call.of(operand)
        if one is None or where is False:
            continue
        one = broadcast(one, shape)
        if isinstance(where, Tensor):
            one = torch.where(where.broadcast_to(shape), one, NONE)
        fields.append(one)
    return [least(fields, shape)] * len(call.results)


def _may_be(call: Call, value: Any, test: Callable[[Tensor], Tensor]) -> Tensor | bool:
    """Where an operand passes a test, or may do so with another value."""
    if not isinstance(value, Tensor):
        return bool(test(torch.as_tensor(value)))
    return test(value) | varies(call.of(value), value)


def _not_zero(value: Tensor) -> Tensor:
    return value != 0


def _mul(call: Call) -> list[Tensor | None]:
    one, other = call.given["self"], call.given["other"]
    return _kept(
        call,
        [(one, _may_be(call, other, _not_zero)), (other, _may_be(call, one, _not_zero))],
    )


def _div(call: Call) -> list[Tensor | None]:
    one, other = call.given["self"], call.given["other"]
    finite = _may_be(call, other, lambda v: ~torch.isinf(v))
    return _kept(call, [(one, finite), (other, _may_be(call, one, _not_zero))])


def _add(call: Call) -> list[Tensor | None]:
    one, other = call.given["self"], call.given["other"]
    scale = call.get("alpha", default=1)
    return _kept(
        call,
        [(one, ~_absorbs(call, other, one)), (other, ~_absorbs(call, one, other) & (scale != 0))],
    )


def _absorbs(call: Call, large: Any, small: Any) -> Tensor:
    """Where a constant is so large that what is added to it makes no difference: -inf, say."""
    if not (isinstance(large, Tensor) and large.is_floating_point() and isinstance(small, Tensor)):
        return torch.zeros((), dtype=torch.bool, device=call.results[0].device)
    reach = small.detach().abs().to(large.dtype)
    reach = reach[torch.isfinite(reach)]
    most = reach.amax() + 1 if reach.numel() else 1
    return (large + most == large) & (large - most == large) & ~varies(call.of(large), large)


def _where(call: Call) -> list[Tensor | None]:
    """One of two, as a mask says."""
    given = call.given
    if "mask" in given:
        chosen, one, other = given["mask"], given["value"], given["self"]
    else:
        chosen, one, other = given["condition"], given["self"], given["other"]
    either = varies(call.of(chosen), chosen)
    return _kept(call, [(chosen, True), (one, chosen | either), (other, ~chosen | either)])


def _copied(call: Call) -> list[Tensor | None]:
    source = call.get("src", "value", "self")
    return [least([call.of(source)], r.shape) for r in call.results]


def _random(call: Call) -> list[Tensor | None]:
    """Random numbers, of a distribution that may be given by a tensor."""
    written = call.function._schema.is_mutable
    by = [call.of(value) for n, value in call.given.items() if not (written and n == "self")]
    return [least(by, r.shape) for r in call.results]


def _constant(call: Call) -> list[Tensor | None]:
    return [None] * len(call.results)


# -- along axes -----------------------------------------------------------------------------


def axes_of(value: Any, dims: int) -> list[int]:
    """Axes as an operator is given them, from 0; all if it is given none."""
    if value is None or (isinstance(value, (list, tuple)) and not value):
        return list(range(dims))
    return [d % max(dims, 1) for d in (value if isinstance(value, (list, tuple)) else [value])]


def _along(call: Call) -> list[Tensor | None]:
    """Each result from all elements along some axes, which it may lack."""
    axes = axes_of(call.get("dim", "axis"), call.given["self"].dim())
    found = lowest(call.field, axes)
    return [_fitted(found, r) for r in call.results]


def _fitted(found: Tensor | None, result: Tensor) -> Tensor | None:
    """A field with axes of one element, as that of a result which may lack them."""
    if found is None or not result.numel():
        return None
    if found[0].numel() == result.numel():
        return found.reshape(-1, *result.shape)
    return broadcast(found, result.shape)


def _running(call: Call) -> list[Tensor | None]:
    found, dims = call.field, call.given["self"].dim()
    if dims:
        found = found.cummin(call.given["dim"] % dims + 1).values
    return [found] * len(call.results)


def _softmax(call: Call) -> list[Tensor | None]:
    value, field = call.given["self"], call.field
    low = value < value.amax(call.given["dim"], keepdim=True) - MASKED if value.numel() else False
    zero = call.results[0] == (-math.inf if "log" in call.name else 0)
    masked = zero & (~varies(field, value) | low)
    rest = torch.where(masked, NONE, field)
    found = lowest(rest, axes_of(call.given["dim"], value.dim()))
    return [torch.where(masked, NONE, found)]


# -- norms ----------------------------------------------------------------------------------


def _layer_norm(call: Call) -> list[Tensor | None]:
    value = call.given["input"]
    field, first = call.of(value), value.dim() - len(call.given["normalized_shape"])
    found = None if field is None else lowest(field, range(first, value.dim()))
    return _normed(call, found, found, [call.of(call.get(n)) for n in ("weight", "bias")])


def _group_norm(call: Call) -> list[Tensor | None]:
    value = call.given["input"]
    field, spread, stats = call.of(value), None, None
    if field is not None:
        shape = (len(value), call.given["group"])
        stats = field.reshape(len(field), *shape, -1).amin(3, keepdim=True)
        spread = stats.expand(-1, -1, -1, value[0].numel() // shape[1]).reshape(field.shape)
    return _normed(call, spread, stats, _by_channel(call, "weight", "bias"))


def _batch_norm(call: Call) -> list[Tensor | None]:
    value = call.given["input"]
    field, stats = call.of(value), None
    if field is not None:
        stats = lowest(field, [a for a in range(value.dim()) if a != 1])
    own = _by_channel(call, "weight", "bias")
    if "no_training" in call.name or not call.get("training", "train", default=True):
        return _normed(call, field, stats, own + _by_channel(call, "running_mean", "running_var"))
    return _normed(call, stats, stats, own)


def _by_channel(call: Call, *names: str) -> list[Tensor | None]:
    """The fields of vectors that have a number for each channel."""
    wide = [1, -1, *[1] * (call.given["input"].dim() - 2)]
    fields = [call.of(call.get(name)) for name in names]
    return [None if f is None else f.reshape(len(f), *wide) for f in fields]


def _normed(
    call: Call, found: Tensor | None, stats: Tensor | None, own: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Normalised values, from `found` and the norm's own weights; beside them its statistics."""
    shape = call.given["input"].shape
    whole = least([found, *own], shape)
    return [whole if r.shape == shape else _fitted(stats, r) for r in call.results]


# -- pooling: each result from a window, whichever of its elements is the largest -----------


def _pooled(call: Call) -> list[Tensor | None]:
    """The field of windows: the smallest numbers in each are the largest, negated."""
    field, result = call.field, call.results[0]
    if result.numel() == 0:
        return [None] * len(call.results)
    axes = int(next(digit for digit in call.name if digit.isdigit()))
    flat = -field.reshape(1, -1, *field.shape[field.dim() - axes :]).float()
    if "output_size" in call.given:
        found = getattr(F, f"adaptive_max_pool{axes}d")(flat, call.given["output_size"])
    else:
        found = getattr(F, f"max_pool{axes}d")(
            flat,
            call.given["kernel_size"],
            call.get("stride") or None,
            call.get("padding", default=0),
            call.get("dilation", default=1),
            call.get("ceil_mode", default=False),
        )
    found = -found.to(torch.int32).reshape(len(field), *result.shape)
    return [found] * len(call.results)


_OPERATORS: dict[Rule, str] = {
    **contractions.RULES,
    **moves.RULES,
    _mul: "mul logical_and bitwise_and",
    _div: "div",
    _add: "add sub",
    _where: "where masked_fill",
    _copied: "copy _to_copy clone fill lift_fresh_copy",
    _constant: """
        zero zeros_like ones_like full_like empty_like new_zeros new_ones new_empty new_full
        new_empty_strided empty_strided rand_like randn_like randint_like
    """,
    _random: "bernoulli normal uniform exponential random cauchy geometric log_normal",
    _pointwise: """
        _prelu_kernel hardswish hardsigmoid log_sigmoid_forward rrelu_with_noise native_dropout
        _fused_dropout floor_divide polar complex hardshrink softshrink
    """,
    _along: """
        sum mean amax amin max min argmax argmin any all prod var std var_mean std_mean
        logsumexp norm linalg_vector_norm median nanmedian nansum count_nonzero mode aminmax
        kthvalue sort topk argsort
    """,
    _running: "cumsum cumprod cummax cummin logcumsumexp",
    _softmax: "_softmax _log_softmax _safe_softmax",
    _layer_norm: "native_layer_norm",
    _group_norm: "native_group_norm",
    _batch_norm: """
        native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_functional
        _native_batch_norm_legit_no_training cudnn_batch_norm miopen_batch_norm
        _batch_norm_with_update _batch_norm_no_update
    """,
    _pooled: """
        max_pool2d_with_indices max_pool3d_with_indices mkldnn_max_pool2d avg_pool1d avg_pool2d
        avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
        _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d
    """,
}
_RULES = {name: rule for rule, names in _OPERATORS.items() for name in names.split()}
