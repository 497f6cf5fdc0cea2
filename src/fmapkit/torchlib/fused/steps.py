"""What torch's fused kernels do on a CPU, operator by operator, of nested tensors, too.

With a mode on the stack (see `torchlib/fused/kernels.py`), each operator inside of a kernel goes
through Python, which takes small models longer than the kernel itself. Called one by one they give
the same, and the maps. Whether to the bit is tried beside the kernel, once for each form of what it
is given: shapes, strides and dtypes, its numbers, the modes, and how many threads there are. Of
nested tensors the lengths do not count: they are others in each batch. What is tried is an input of
our own: of one that is zero throughout, say, all ways to add up give the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fmapkit.torchlib.nested import tensors_in

# Maps by name, each with the bias that is still to be added, if there is any.
Shown = dict[str, tuple[Tensor, Tensor | None]]

# By the form of what a kernel is given: whether it gave the same another way.
_tried: dict[Any, bool] = {}
_MOST = 4096


def in_steps(kernel: Callable[..., Any], args: Any) -> tuple[Any, Shown] | None:
    """Run a kernel step by step: what it returns, and its maps.

    None where its steps are not known, or give something else.
    """
    steps = _STEPS.get(kernel)
    if steps is None:
        return None
    modes = torch.get_num_threads(), torch.is_inference_mode_enabled()
    form = kernel, *modes, *_form(args)

    def both() -> tuple[Any, Any]:
        given = telling(args)
        return steps(*given)[0], kernel(*given)

    with torch._C.DisableTorchFunction():  # a mode of another capture's is to see the kernel alone
        try:
            return steps(*args) if proven(form, both) else None
        except RuntimeError:  # torch has them otherwise here: the kernel itself tells
            _tried[form] = False
            return None


def proven(form: Any, both: Callable[[], tuple[Any, Any]]) -> bool:
    """Whether `both` ways to run a kernel return the same, to the bit: tried once for each form."""
    if form not in _tried:
        if len(_tried) >= _MOST:
            _tried.clear()
        _tried[form] = all(map(_same, *map(tensors_in, both())))
    return _tried[form]


def _same(a: Tensor, b: Tensor) -> bool:
    a, b = _dense(a), _dense(b)
    if (a.shape, a.stride(), a.dtype) != (b.shape, b.stride(), b.dtype):
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all())


def telling(args: Any) -> list[Any]:
    """A kernel's arguments with another input, drawn at random; it has the form of the first."""
    x = args[0]
    drawing = torch.Generator().manual_seed(0)
    if x.is_nested:
        drawn = torch.randn(x.numel(), generator=drawing, device="cpu")
        made = _as(x, drawn.to(x.device, x.dtype))
    else:
        length = 1 + sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
        drawn = torch.randn(length, generator=drawing, device="cpu")
        made = drawn.to(x.device, x.dtype).as_strided(x.shape, x.stride())
    return [made if a is x else a for a in args]


def _form(args: Any) -> list[Any]:
    found: list[Any] = []
    for value in args:
        if not isinstance(value, Tensor):
            found.append(value)
        elif value.is_nested:
            found += value.size(0), value.dtype, value.requires_grad, value.is_inference()
        else:
            found += value.shape, value.stride(), value.dtype
            found += value.requires_grad, value.is_inference()
    return found


def _dense(tensor: Tensor) -> Tensor:
    """The values of a nested tensor, one after the other; any other tensor as it is."""
    return torch.ops.aten.values.default(tensor) if tensor.is_nested else tensor


def _rows(tensor: Tensor, width: int) -> Tensor:
    """Token by token."""
    return _dense(tensor).view(-1, width)


def _as(like: Tensor, rows: Tensor) -> Tensor:
    """Tokens in the shape of others of the same width."""
    if not like.is_nested:
        return rows.view(like.shape)
    places = like._nested_tensor_strides(), like._nested_tensor_storage_offsets()
    return torch._nested_view_from_buffer(rows.view(-1), like._nested_tensor_size(), *places)


def _attention(
    x: Tensor,
    key: Tensor,
    value: Tensor,
    width: int,
    heads: int,
    weight: Tensor,
    bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average: bool = True,
    mask_type: int | None = None,
) -> tuple[Any, Shown]:
    """`torch._native_multi_head_attention`."""
    # Products go another way where a weight requires gradients, as the kernel sees it.
    by = weight if torch.is_inference_mode_enabled() else weight.detach()
    product = F.linear(x, by) if x.is_nested else torch.matmul(x, by.t())
    parts = torch._transform_bias_rescale_qkv(product, bias, heads)
    samples, _, tokens, _ = parts[0].shape
    q, k, v = (part.view(samples * heads, tokens, -1) for part in parts)
    scores = torch.bmm(q, k.transpose(2, 1)).view(samples, heads, tokens, -1)
    if x.is_nested:
        if mask is not None or need_weights:
            raise RuntimeError("no step is known")
        shares = torch._nested_tensor_softmax_with_shape(scores, x)
    elif mask is None:
        shares = torch.softmax(scores, 3)
    else:
        shares = torch._masked_softmax(scores, mask.to(torch.bool), 3, mask_type)
    mixed = torch.bmm(shares.view(samples * heads, tokens, -1), v)
    mixed = mixed.view(samples, heads, tokens, -1)
    if x.is_nested:
        mixed = torch._nested_from_padded(mixed, x._nested_tensor_size(), True)
    else:
        mixed = mixed.permute(0, 2, 1, 3).contiguous().view(samples, tokens, width)
    out = F.linear(mixed, out_weight, out_bias)
    maps: Shown = {
        "in_proj": (_rows(product, 3 * width), bias),
        "out_proj": (_rows(out, width), None),
    }
    if not need_weights:
        return (out, None), maps
    return (out, shares.sum(1) / heads if average else shares), maps


def _layer(
    x: Tensor,
    width: int,
    heads: int,
    weight: Tensor,
    bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    gelu: bool,
    norm_first: bool,
    eps: float,
    norm1: Tensor,
    norm1_bias: Tensor,
    norm2: Tensor,
    norm2_bias: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> tuple[Any, Shown]:
    """`torch._transformer_encoder_layer_fwd`."""

    def normed(t: Tensor, by: Tensor, bias: Tensor) -> Tensor:
        return torch.layer_norm(t, (width,), by, bias, eps)

    y = normed(x, norm1, norm1_bias) if norm_first else x
    own = y, y, y, width, heads, weight, bias, out_weight, out_bias, mask, False, True, mask_type
    (out, _), maps = _attention(*own)
    y = out + x
    if not norm_first:
        y = normed(y, norm1, norm1_bias)
    inner = normed(y, norm2, norm2_bias) if norm_first else y
    z = torch.addmm(bias1, _rows(inner, width), weight1.t())
    a = F.gelu(z) if gelu else torch.relu(z)
    z2 = torch.addmm(bias2, a, weight2.t())
    maps |= {"linear1": (z, None), "activation": (a, None), "linear2": (z2, None)}
    y = _as(y, z2) + y
    return (y if norm_first else normed(y, norm2, norm2_bias)), maps


_STEPS: dict[Any, Callable[..., tuple[Any, Shown]]] = {
    torch._native_multi_head_attention: _attention,
    torch._transformer_encoder_layer_fwd: _layer,
}
