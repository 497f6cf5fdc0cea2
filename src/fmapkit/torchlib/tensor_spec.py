"""What decides whether a cast or a reshape copies: dtypes, layouts, and autocast.

`x.float()`, `x.contiguous()` and `x.reshape(...)` return x itself, a view of it, or a copy, as the
case may be; so a write to the result is a write to x, or it is not. Calls that differ here are of
another kind, and are learned apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fmapkit.torchlib.memory import storage_of
from fmapkit.torchlib.nested import modules_in
from fmapkit.torchlib.transforms import is_shapeless

_DEVICES = ("cpu", "cuda")
_strided = torch.strided
_TOLD = frozenset({type(None), bool, int, str})
_any_autocast: Callable[[], bool] = getattr(
    torch._C,
    "_is_any_autocast_enabled",
    lambda: any(torch.is_autocast_enabled(device) for device in _DEVICES),
)


def ones(shape: Sequence[int]) -> tuple[int, ...]:
    """Which axes are of size 1, and which of 0; all others are alike."""
    return tuple([min(size, 2) for size in shape])


def form_of(tensor: Tensor) -> Any:
    """Rank, dtype and layout of an argument, and which axes have no length.

    Not its shape, which may change freely: but where it is 1, the tensor may be broadcast, and the
    filters of a sum are those of the operand that is not.
    """
    if tensor.layout is not _strided or tensor.is_nested:
        return tensor.dim(), tensor.dtype, tensor.layout
    shape = tensor.shape
    short = ones(shape) if 1 in shape or 0 in shape else len(shape)
    if tensor.is_contiguous():  # one pixel is channels-last, too, if its strides say so
        return short, tensor.dtype, len(shape) > 3 and tensor.stride(-1)
    strides = tensor.stride()
    spans = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    order = tuple(sorted(range(len(strides)), key=strides.__getitem__))
    return short, tensor.dtype, order, 0 in strides, spans + 1 == tensor.numel()


def sharing(tensors: Sequence[Tensor]) -> tuple[int, ...] | None:
    """By tensor, the first that lies where it does; None if each has a memory of its own.

    A write to one that lies in the same memory is a write to all of them.
    """
    storages = [-1 if is_shapeless(t) else storage_of(t) for t in tensors]
    if len(set(storages)) == len(storages):
        return None
    return tuple(map(storages.index, storages))


def plain_spec(args: Any, kwargs: Any) -> Any:
    """All that a call may differ by which is given plain tensors; None if there is more to it."""
    found: list[Any] = [*kwargs]
    tensors = []
    for value in (*args, *kwargs.values()):
        kind = type(value)
        if kind is Tensor and value.layout is _strided and not value.is_nested:
            found += value.shape, value.stride(), value.dtype
            tensors.append(value)
        elif kind in _TOLD:
            found += kind, value
        else:
            return None
    return found, sharing(tensors) if len(tensors) > 1 else None


def casts() -> Any:
    """What autocast does at the moment; None while it is off."""
    if not _any_autocast():
        return None
    return tuple([(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in _DEVICES])


def autocasting() -> list[str]:
    """The devices for which autocast is on."""
    return [d for d in _DEVICES if torch.is_autocast_enabled(d)] if _any_autocast() else []


def weights_of(module: nn.Module) -> Callable[[], Any]:
    """Tells dtype, layout and class of the module's weights, by a few that stand for all.

    Those are the first and the last, and the first and the last of a convolution's. A lazy module
    has none before its first call.
    """
    # What a scripted module runs nobody sees.
    owners = [m for m in modules_in(module) if not isinstance(m, torch.jit.ScriptModule)]
    weights = [
        (m._parameters, name, weight)
        for m in owners
        for name, weight in m._parameters.items()
        if weight is not None and weight.is_floating_point()
    ]
    images = [one for one in weights if not is_lazy(one[2]) and one[2].dim() > 3]
    chosen = (*weights[:1], *weights[-1:], *images[:1], *images[-1:])
    looked_at = list({id(there): (there, name) for there, name, _ in chosen}.values())

    def form() -> Any:
        found: list[Any] = []
        for held, name in looked_at:
            weight = held.get(name)
            if type(weight) is nn.Parameter or (weight is not None and not is_lazy(weight)):
                found += weight.dtype, weight.stride(), type(weight)
        return found

    return form
