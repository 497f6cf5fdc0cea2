"""Taps that stand before a module's call instead of being hooks: the same, at a fraction of a hook.

A forward hook takes a module off torch's fast path. Most sites are small modules without weights,
children or hooks of others (`nn.ReLU`), of which input and output are all there is to see; one that
stands before the call (see `torchlib/call_override.py`) sees both.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from functools import partial
from types import FrameType, MethodType
from typing import Any

from torch import nn

from fmapkit.instrumentation import Hook
from fmapkit.replay.taps import (
    CurrentRun,
    HookTap,
    read_overwritten,
    read_xy,
    read_xy_and_gradients,
    read_y,
    read_y_and_gradient,
)
from fmapkit.torchlib.call_override import (
    CallOverride,
    all_hooks,
    all_pre_hooks,
    called,
    compiled_as_bare,
    dynamo,
    free,
    lock,
    note,
    passed_over,
)
from fmapkit.torchlib.in_place import sigma_apart, with_new_memory
from fmapkit.torchlib.memory import version_of

# What every module has, and what we set.
_OF_EACH = nn.Module().__dict__.keys() | {"inplace", "_compiled_call_impl"}
_getframe: Callable[[int], FrameType] = sys._getframe
_functional = vars(nn.functional)
_NO_NAMES: dict[str, Any] = {}


class CallTap(CallOverride):
    """Does a `HookTap`'s work in the usual case, and has that tap do it in any other."""

    __slots__ = ("ends", "line", "tap", "theirs")

    def __init__(self, module: nn.Module, tap: HookTap) -> None:
        self.module = module
        self.tap = tap
        self.owner = tap.owner
        self.line = tap.line
        # None yet; one that is set now may change what z is, or what is returned in place of a.
        self.theirs, self.ends = module._forward_pre_hooks, module._forward_hooks

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cell = self.line.cell
        if cell is None or (
            (self.theirs or self.ends or all_pre_hooks or all_hooks) and self.moved()
        ):
            return self.otherwise(args, kwargs)
        module = self.module
        output = self.inner(*args, **kwargs)
        note, how, wanted, drop, _ = cell
        if module not in wanted:  # a tap of another plan
            return output
        try:
            if how > 1:
                note(read_xy(module, args, output, how))
            else:  # the same in place: most sites of most passes are read here
                x, a = args[0], output
                if how:
                    if x.requires_grad:
                        x = x.detach()
                    if a.requires_grad:
                        a = a.detach()
                note((module, a, a._version, x, x._version))
            drop(None)
        except Exception as error:  # ours, not the user's: named in `missed`, never raised
            self.tap.again(module, args, output, error)
        return output

    def moved(self) -> bool:
        """Whether hooks of others may change what it is given, or returns, in this thread.

        A block in another thread sets its own on the same modules; here they do nothing.
        """
        return bool(all_pre_hooks or all_hooks) or _hooked(self.theirs) or _hooked(self.ends)

    @passed_over
    def otherwise(self, args: Any, kwargs: Any) -> Any:
        """No run is under way in this thread, or others have set hooks in the middle of one."""
        module = called(self.module, 3)
        if dynamo() is not None:
            note()
            return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        if module is not self.module:
            return self.of_copy(module, args, kwargs)
        output = self.inner(*args, **kwargs)
        if self.line.cell is None:
            self.tap(module, args, output)  # which knows what to do then
        return output

    compiled_as_bare(__call__)


class OutputCallTap(CallTap):
    """The same for what a module returns, before any module: hooks of others run in its call."""

    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cell = self.line.cell
        module = self.module
        if cell is None or _getframe(1).f_locals.get("self") is not module:
            return self.otherwise(args, kwargs)
        output = self.inner(*args, **kwargs)
        note, how, wanted, drop, _ = cell
        if module not in wanted:
            return output
        try:
            if how > 1:
                note(read_y(module, args, output, how))
            else:
                a = output.detach() if how and output.requires_grad else output
                note((module, a, a._version))
            drop(None)
        except Exception as error:  # ours, not the user's: named in `missed`, never raised
            self.tap.again(module, args, output, error)
        return output

    compiled_as_bare(__call__)


class KeepingCallTap(CallTap):
    """The same for a module that is an in-place nonlinearity: z is kept as it was."""

    __slots__ = (*("_apart", "_count", "_forward", "_function", "_name", "_sigma", "_varies"),)

    def __init__(self, module: nn.Module, tap: HookTap) -> None:
        super().__init__(module, tap)
        # The same module, out of place. It is never called, so no hook is asked.
        self._apart = type(module).__new__(type(module))
        self._sigma = self._apart.forward
        self._forward = type(module).forward
        self._name = next((n for n in self._forward.__code__.co_names if n in _functional), "")
        self._function = _functional.get(self._name)
        # Whether there is more to σ than its name: a slope, say, which may change at any time.
        self._varies = not module.__dict__.keys() <= _OF_EACH
        self._count = len(module.__dict__.keys() | {"_compiled_call_impl"})
        self._refresh()

    def _refresh(self) -> None:
        attributes: dict[str, Any] = self._apart.__dict__
        attributes.clear()
        attributes.update(self.module.__dict__, inplace=False, _compiled_call_impl=None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cell = self.line.cell
        if cell is None or (
            (self.theirs or self.ends or all_pre_hooks or all_hooks) and self.moved()
        ):
            return self.otherwise(args, kwargs)
        note, _, wanted, drop, fresh = cell
        module = self.module
        if module not in wanted:
            return self.inner(*args, **kwargs)
        own = module.__dict__
        # Code that sets attributes within a pass may have made another σ of it.
        if (
            len(own) != self._count
            or not own.get("inplace")
            or type(module).forward is not self._forward
            or _functional.get(self._name) is not self._function
        ):
            self.line.run.stray(type(module).__name__)
            return self.inner(*args, **kwargs)
        try:
            x, z = args[0], None
            # Where another capture stands behind us, it is to see the module's own call.
            if fresh and type(self.inner) is MethodType:
                if self._varies:
                    self._refresh()
                z = sigma_apart(x, self._sigma, (x,), _NO_NAMES)
        except Exception as error:  # ours, not the user's: named in `missed`, never raised
            self.tap.fault(module, error)
            return self.inner(*args, **kwargs)
        if z is None:
            return self._slowly(args, kwargs)
        note((module, x, x._version, z, z._version, False))
        drop(None)
        return x

    def _slowly(self, args: Any, kwargs: Any) -> Any:
        """The same where maps share memory, or no version is counted; else z is copied."""
        run, cell, x = self.line.run, self.line.cell, args[0]
        assert cell is not None
        note, how, _, drop, _ = cell
        z: Any = None
        try:
            self._refresh()
            if type(self.inner) is MethodType:
                z = run.before_in_place(x)
        except Exception as error:  # ours, not the user's: named in `missed`, never raised
            self.tap.fault(self.module, error)
            return self.inner(*args, **kwargs)
        kept = z is not None and with_new_memory(x, lambda: self._sigma(x))
        if not kept:
            z = run.copied(x)
        output = x if kept else self.inner(*args, **kwargs)
        try:
            a = output.detach() if how and (output.requires_grad or how > 2) else output
            note((self.module, a, version_of(a), z, version_of(z), not kept))
            drop(None)
        except Exception as error:  # ours, not the user's: named in `missed`, never raised
            self.tap.fault(self.module, error)
        return output

    compiled_as_bare(__call__)


def _hooked(hooks: dict[int, Any]) -> bool:
    """Whether some hooks do anything in this thread."""
    thread = threading.get_ident()
    return not all(
        isinstance(hook, Hook) and getattr(hook.owner, "thread", thread) != thread
        for hook in tuple(hooks.values())
    )


def tap_of(
    slots: str, line: CurrentRun, other: Any, fault: Any, owner: object, gradients: bool = False
) -> HookTap:
    """The tap of a site, at the least cost.

    Args:
        slots: what it notes: "xy", "y", or "kept": of an in-place nonlinearity, z as it was, and y.
        gradients: note where they will arrive, too.
    """
    if gradients:
        read = read_xy_and_gradients if slots == "xy" else read_y_and_gradient
        return HookTap(read, line, other, fault, owner)
    read, stand = _TAPS[slots]
    return HookTap(read, line, other, fault, owner, stand)


def _stand(kind: type[CallTap], module: nn.Module, tap: HookTap) -> CallTap | None:
    """A tap before the module's call; None where only a hook will do."""
    with lock:
        if not (free if kind is OutputCallTap else can_stand)(module):
            return None
        return kind(module, tap).stand(module)


_TAPS = {
    "xy": (read_xy, partial(_stand, CallTap)),
    "y": (read_y, partial(_stand, OutputCallTap)),
    "kept": (read_overwritten, partial(_stand, KeepingCallTap)),
}


def can_stand(module: nn.Module) -> bool:
    """Whether a tap may stand before a module's call."""
    if module._parameters or module._buffers or module._modules:
        return False
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    if all_hooks or all_pre_hooks:
        return False
    return free(module)
