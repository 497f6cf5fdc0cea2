"""Modes on torch's stacks: the one place that takes one off; who else looks on, or records."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

# A mode's `with` does no more than this, several calls deeper.
push_mode: Callable[[Any], None] = torch._C._push_on_torch_function_stack
pop_mode: Callable[[], Any] = torch._C._pop_torch_function_stack
mode_count: Callable[[], int] = torch._C._len_torch_function_stack
dispatch_mode_count: Callable[[], int] = torch._C._len_torch_dispatch_stack
_transform: Callable[[], Any] = torch._C._functorch.peek_interpreter_stack
jit_trace: Callable[[], Any] = torch._C._get_tracing_state  # None where torch.jit traces nothing
_compiler: dict[str, Any] = vars(torch.compiler)
_flag = "_is_compiling_flag"  # what `is_compiling` returns outside of scripted code
_proxies: Callable[[int], Any] = torch._ops.mode_stack_state_for_pre_dispatch().get  # type: ignore[no-untyped-call]
_with_cuda: bool = torch.backends.cuda.is_built()  # type: ignore[no-untyped-call]


# Whether functions are handed to modes and to classes of tensors, in this thread. Older versions of
# torch do not tell.
function_state: Callable[[], Any] = getattr(torch._C, "_get_torch_function_state", lambda: None)
set_function_state: Callable[[Any], None] = getattr(
    torch._C, "_set_torch_function_state", lambda state: None
)


def recorded_by_cuda() -> bool:
    """Whether what runs is recorded into a CUDA graph."""
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return started and torch.cuda.is_current_stream_capturing()


def compiling() -> bool:
    """Whether torch.export or torch.compile traces code now, with what stands for tensors."""
    return bool(_compiler[_flag] if _flag in _compiler else torch.compiler.is_compiling())


def nothing_between() -> bool:
    """Whether nothing of torch's stands between Python and its operators.

    That is: no mode, no transform of torch.func, nobody who traces, exports or compiles, and no
    recording into a CUDA graph. It is asked before each pass, so in as few calls as will do.
    """
    return not (
        mode_count()
        or dispatch_mode_count()
        or _transform() is not None
        or jit_trace() is not None
        or (_compiler[_flag] if _flag in _compiler else torch.compiler.is_compiling())
        or _proxies(0) is not None  # make_fx before dispatch
        or (_with_cuda and recorded_by_cuda())
    )


def leave_mode(mode: TorchFunctionMode) -> None:
    """Take a function mode off torch's stack, wherever it lies; those above it stay."""
    above = []
    while mode_count():
        top = pop_mode()
        if top is mode:
            break
        above.append(top)
    for other in reversed(above):
        push_mode(other)


@contextmanager
def without_modes() -> Iterator[None]:
    """Torch's stack of function modes, empty for a while; what is put on it there works."""
    modes = [pop_mode() for _ in range(mode_count())]
    try:
        yield
    finally:
        for mode in reversed(modes):
            push_mode(mode)


# Called with the frame of whoever asks whether a mode of ours is of some other kind.
when_asked: list[Callable[[FrameType], None]] = []


class ObserverMode(TorchFunctionMode):
    """One of ours: without capture, it would not be there.

    torch looks through the stack for modes of its own before it does what ours would be in the way
    of (see `torchlib/apart.py`). `isinstance` asks for the attribute then.
    """

    @property  # type: ignore[misc]
    def __class__(self) -> type[ObserverMode]:
        for tell in when_asked:
            tell(sys._getframe(1))
        return type(self)


@contextmanager
def without_ours() -> Iterator[None]:
    """Torch's stack of function modes without those of ours; in the end it is what it was."""
    modes = [pop_mode() for _ in range(mode_count())][::-1]
    for mode in modes:
        if not isinstance(mode, ObserverMode):
            push_mode(mode)
    try:
        yield
    finally:
        for _ in range(mode_count()):
            pop_mode()
        for mode in modes:
            push_mode(mode)


def all_ours() -> bool:
    """Whether no function mode but ours is on torch's stack."""
    stack = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return all(isinstance(mode, ObserverMode) for mode in stack)


def is_torchs(mode: Any) -> bool:
    """Whether a mode is one of torch's own: fake tensors are what they are by one."""
    return type(mode).__module__.startswith("torch.")


def others_watch() -> bool:
    """Whether a mode that is none of ours, nor of torch's, sees every function, or operator."""
    if not mode_count() and not dispatch_mode_count():
        return False
    modes = [*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()]  # type: ignore[no-untyped-call]
    return not all(isinstance(mode, ObserverMode) or is_torchs(mode) for mode in modes)


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
