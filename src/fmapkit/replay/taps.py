"""Taps: the hooks that read a site. They note what they see, and leave all else for later.

What they write to is the log of the `ReplayRun` (see `replay/run.py`) that is under way in their
thread. A tap is one of two, with the same way to `read`: a `HookTap`, which stands for a forward
hook, or one that does its work at the least cost, before the module's call (`replay/call_taps.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Container
from typing import Any

from torch import nn

from fmapkit.instrumentation import Hook, nothing
from fmapkit.storage import watch
from fmapkit.torchlib.call_override import CallOverride, not_compiled
from fmapkit.torchlib.memory import version_of

# The `append` of a run's log; how tensors are to be read; the modules whose end the run's plan
# wants to see; what lets go of an older map (see `Pass.drop`); whether an in-place nonlinearity may
# write to fresh memory, and nothing else that is held lies in the old one.
Cell = tuple[
    Callable[[Any], None],
    int,
    Container[nn.Module],
    Callable[[Any], None],
    bool,
]

# What is noted of a site: (module, args, output, how) -> its entry of the log.
Read = Callable[[nn.Module, Any, Any, int], tuple[Any, ...]]


class CurrentRun(threading.local):
    """Where taps write to: the run that is under way in this thread.

    Per thread, so that a tap that fires in another one, which is not captured, finds nothing.
    """

    # None while no run is under way. Tensors are to be read: 0 as they are, 1 outside the
    # graph, 2 with inference tensors among them, 3 outside of a graph that they may become
    # part of, 4 both.
    cell: Cell | None = None
    run: Any = None  # that the cell is of

    def exchange(self, cell: Cell | None) -> Cell | None:
        """Have taps write to another cell, or nowhere; the one before."""
        before, self.cell = self.cell, cell
        return before


# -- what is read -----------------------------------------------------------------------------


def read_xy(module: nn.Module, args: Any, output: Any, how: int) -> tuple[Any, ...]:
    """z, a and their versions."""
    x = args[0]
    if how > 1:
        if how > 2:
            x, output = x.detach(), output.detach()
        return module, output, version_of(output), x, version_of(x)
    if how:
        x = x.detach() if x.requires_grad else x
        output = output.detach() if output.requires_grad else output
    return module, output, output._version, x, x._version


def read_y(module: nn.Module, args: Any, output: Any, how: int) -> tuple[Any, ...]:
    """What the module returns, and its version."""
    if how and (output.requires_grad or how > 2):
        output = output.detach()
    return module, output, version_of(output) if how > 1 else output._version


def read_xy_and_gradients(module: nn.Module, args: Any, output: Any, how: int) -> tuple[Any, ...]:
    """z, a, their versions, and where their gradients will arrive."""
    x = args[0]
    grads = watch(output), watch(x)
    if grads[1] is not None and (how or not output.requires_grad):
        grads[1].used_by(output)
    if how:
        x, output = x.detach(), output.detach()
    return module, output, version_of(output), x, version_of(x), *grads


def read_y_and_gradient(module: nn.Module, args: Any, output: Any, how: int) -> tuple[Any, ...]:
    """What the module returns, its version, and where its gradient will arrive."""
    grad = watch(output)
    if how:
        output = output.detach()
    return module, output, version_of(output), grad, None


def read_overwritten(module: nn.Module, args: Any, output: Any, how: int) -> tuple[Any, ...]:
    """Of an in-place nonlinearity, whose z only a tap before the call can keep."""
    raise RuntimeError("a hook saw z after it was overwritten")


# -- who reads it -----------------------------------------------------------------------------


class HookTap(Hook):
    """The hook of a site."""

    __slots__ = ("_stand", "fault", "line", "read")

    def __init__(
        self,
        read: Read,
        line: CurrentRun,
        other: Any,
        fault: Any,
        owner: object,
        stand: Callable[[nn.Module, HookTap], CallOverride | None] = nothing,
    ) -> None:
        super().__init__(other, owner)  # called with the hook's arguments when no run is under way
        self.read = read  # what it notes of a call
        self.line = line
        self.fault = fault  # called with the module and the error, should we fail
        # Puts before a module what does the same at less cost; returns None where that cannot be.
        self._stand = stand

    def is_like(self, other: Hook) -> bool:
        """Whether another hook does the same."""
        return isinstance(other, HookTap) and other.read is self.read

    def after(self, module: nn.Module) -> CallOverride:
        """Read the module's calls."""
        standing = self._stand(module, self)
        return standing if standing is not None else super().after(module)

    @not_compiled
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        cell = self.line.cell
        if cell is None:
            self.call(module, args, output)
            return
        note, how, wanted, drop, _ = cell
        if module not in wanted:  # a tap of another plan
            return
        try:
            note(self.read(module, args, output, how))
            drop(None)
        except Exception as error:  # ours, not the user's: named in `missed`, never raised
            self.again(module, args, output, error)

    def again(self, module: nn.Module, args: Any, output: Any, error: Exception) -> None:
        """The quick look has failed: it is not made for inference tensors, which may turn up."""
        cell = self.line.cell
        if cell is None or cell[1] in (2, 4):
            self.fault(module, error)
            return
        note, how, ends, drop, _ = cell
        self.line.cell = (note, 4 if how else 2, ends, drop, False)
        self(module, args, output)

    def disarm(self) -> None:
        """Let go of the session and its run."""
        super().disarm()
        self.line = CurrentRun()
        self.fault = nothing
