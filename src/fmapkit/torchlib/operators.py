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


# Whose operators do what their names say: those of others may have any name.
_NAMED_AS_TORCHS = frozenset(
    {
        *("aten", "prim", "prims", "mkldnn", "onednn", "sparse", "c10d", "symm_mem", "_dtensor"),
        *("quantized", "_quantized", "quantized_decomposed"),
        *("_c10d_functional", "_c10d_functional_autograd"),
    }
)


def operators_of(function: Any) -> list[Any]:
    """The operators that one of `torch.ops` stands for; none of any other function."""
    if isinstance(function, torch._ops.OpOverload):
        return [function]
    if isinstance(function, torch._ops.OpOverloadPacket):
        packet: Any = function
        return [getattr(packet, name) for name in packet.overloads()]
    return []


def namespace_of(operators: list[Any]) -> str:
    """The namespace of operators that are not torch's; empty of those that are."""
    found: str = operators[0].namespace if operators else ""
    return "" if found in _NAMED_AS_TORCHS else found


def mutated(operators: list[Any]) -> tuple[tuple[int, str], ...]:
    """The arguments that operators write to, but for torch's `out`: each by place and by name."""
    arguments = [pair for one in operators for pair in enumerate(one._schema.arguments)]
    return tuple(
        sorted(
            {(at, a.name) for at, a in arguments if a.alias_info and a.alias_info.is_write}
            - {(at, "out") for at, a in arguments if a.kwarg_only}
        )
    )
