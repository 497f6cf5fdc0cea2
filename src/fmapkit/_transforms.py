"""Tensors of torch.func transforms: they must not be kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fmapkit._nested import tensors_in

__all__ = ["TRANSFORMED", "transformed", "transforming", "under_transform", "wrapped"]

TRANSFORMED = (
    "it runs under a torch.func transform (vmap, grad, …): its tensors live only inside the "
    "transform, and cannot be held"
)

# The same of what is known to be a tensor.
wrapped: Callable[[Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor
# The innermost transform that is at work; None where none is.
transforming: Callable[[], Any] = torch._C._functorch.peek_interpreter_stack


def transformed(value: Any) -> bool:
    """Whether it is a tensor of a torch.func transform, which must not be kept."""
    return isinstance(value, Tensor) and wrapped(value)


def under_transform(module: nn.Module, value: Any) -> bool:
    """Whether a torch.func transform is at work on a call: on what it is given, or its weights."""
    if transforming() is None:
        return False
    with torch._C.DisableTorchFunction():
        # Under `grad` and its like, whatever runs gives a tensor of the transform.
        if transformed(torch.empty(()).detach()):
            return True
        own = (*module.parameters(), *module.buffers())
        return any(transformed(t) for t in (*tensors_in(value), *own))
