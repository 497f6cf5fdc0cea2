"""Tensors that are not held: of torch.func transforms, and such that have no shape."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad
from torch import Tensor, nn

from fmapkit.torchlib.nested import tensors_in

_is_nested: Callable[[Tensor], bool] = operator.attrgetter("is_nested")
_is_wrapped: Callable[[Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor
_unwrapped: Callable[[Tensor], Tensor] = torch._C._functorch.get_unwrapped
# The innermost transform that is at work; None where none is.
transforming: Callable[[], Any] = torch._C._functorch.peek_interpreter_stack


class _Returned(threading.local):
    """Whether maps of this thread are returned inside of the transform that they live in.

    Nobody holds them beyond it then, and they are maps like any other.
    """

    on = False


returned = _Returned()


def wrapped(tensor: Tensor) -> bool:
    """Whether what is known to be a tensor is one of a transform, which must not be kept."""
    return _is_wrapped(tensor) and not returned.on


def inner(tensor: Tensor) -> Tensor:
    """The tensor that a transform's stands for, which has memory; any other one as it is."""
    while _is_wrapped(tensor):
        tensor = _unwrapped(tensor)
    return tensor


def forward_derivatives() -> bool:
    """Whether forward-mode derivatives are computed: a tensor may have a tangent beside its values.

    Other memory for the values would leave that behind.
    """
    level: int = torch.autograd.forward_ad._current_level
    return level >= 0


def transformed(value: Any) -> bool:
    """Whether it is a tensor of a torch.func transform, which must not be kept."""
    return isinstance(value, Tensor) and wrapped(value)


def is_shapeless(tensor: Tensor) -> bool:
    """Whether it is a nested one of the strided layout."""
    return tensor.is_nested and tensor.layout is torch.strided


def some_shapeless(tensors: Sequence[Tensor]) -> bool:
    return any(map(_is_nested, tensors)) and any(map(is_shapeless, tensors))


def under_transform(module: nn.Module, value: Any) -> bool:
    """Whether a torch.func transform is at work on a call: on what it is given, or its weights."""
    if transforming() is None or returned.on:
        return False
    with torch._C.DisableTorchFunction():
        # Under `grad` and its like, whatever runs gives a tensor of the transform.
        if transformed(torch.empty(()).detach()):
            return True
        own = (*module.parameters(), *module.buffers())
        return any(transformed(t) for t in (*tensors_in(value), *own))


@contextmanager
def undone_transforms() -> Iterator[None]:
    """Transforms that begin in it and are not ended, as where a graph broke off, end with it."""
    depth = torch._C._functorch.get_dynamic_layer_stack_depth()
    try:
        yield
    finally:
        torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)


def unholdable(tensor: Tensor) -> bool:
    """Whether a tensor cannot be held: it has no shape, or lives inside a transform only."""
    if tensor.is_nested and is_shapeless(tensor):
        return True
    return _is_wrapped(tensor) and not returned.on
