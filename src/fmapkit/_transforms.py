"""Tensors of torch.func transforms: they must not be kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["TRANSFORMED", "transformed"]

TRANSFORMED = (
    "it runs under a torch.func transform (vmap, grad, …): its tensors live only inside the "
    "transform, and cannot be held"
)


def transformed(value: Any) -> bool:
    """Whether it is a tensor of a torch.func transform, which must not be kept."""
    functorch = torch._C._functorch
    return isinstance(value, Tensor) and bool(functorch.is_functorch_wrapped_tensor(value))
