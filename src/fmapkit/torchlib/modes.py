"""Modes on torch's stack: the one place that takes one off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode, _pop_mode, _push_mode

__all__ = ["leave_mode", "without_modes"]


def leave_mode(mode: TorchFunctionMode) -> None:
    """Take a function mode off torch's stack, wherever it lies; those above it stay."""
    above = []
    while torch._C._len_torch_function_stack():
        top = _pop_mode()  # type: ignore[no-untyped-call]
        if top is mode:
            break
        above.append(top)
    for other in reversed(above):
        _push_mode(other)  # type: ignore[no-untyped-call]


@contextmanager
def without_modes() -> Iterator[None]:
    """Torch's stack of function modes, empty for a while; what is put on it there works."""
    count = torch._C._len_torch_function_stack()
    modes = [_pop_mode() for _ in range(count)]  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for mode in reversed(modes):
            _push_mode(mode)  # type: ignore[no-untyped-call]
