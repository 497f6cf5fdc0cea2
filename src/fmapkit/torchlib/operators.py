"""Operators as torch's dispatcher sees them, and the trees of their arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._python_dispatch import (
    is_traceable_wrapper_subclass as is_traceable_wrapper_subclass,
)
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map

# Where functions written in C are found, beside `torch` and `torch.nn.functional`.
NATIVE = (torch._C._nn, torch._C._VariableFunctions)

without_torch_function: Any = torch._C.DisableTorchFunction


def native(name: str) -> Any:
    """The function in C of that name, as `torch` has it; 0 if there is none."""
    return getattr(torch._C._VariableFunctions, name, 0)


def is_composite(func: Any) -> bool:
    """Whether torch has an operator as a function of others, and nothing else."""
    return bool(
        torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    )
