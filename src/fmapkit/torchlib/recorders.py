"""Who records what runs, to run it again without Python: torch.jit.trace, make_fx, torch.fx."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

__all__ = ["fx_is_tracing", "jit_is_tracing", "make_fx_is_tracing"]


def jit_is_tracing() -> bool:
    """Whether torch.jit.trace traces."""
    return bool(torch._C._get_tracing_state())


def make_fx_is_tracing() -> bool:
    """Whether make_fx traces, by either of its modes; torch 2.4 has no `get_proxy_mode`."""
    key = torch._C._TorchDispatchModeKey.PROXY
    before: Any = torch._ops._get_dispatch_mode_pre_dispatch(key)  # type: ignore[no-untyped-call]
    return before is not None or torch._C._get_dispatch_mode(key) is not None


def fx_is_tracing() -> bool:
    """Whether torch.fx traces: it calls modules with what stands for tensors."""
    tracer: Any = fx._symbolic_trace
    if hasattr(tracer, "_get_is_fx_tracing"):  # since torch 2.14, a thread has a flag of its own
        return bool(tracer._get_is_fx_tracing())
    return bool(tracer._is_fx_tracing_flag)
