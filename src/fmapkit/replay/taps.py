"""Taps: the hooks that read a site. They note what they see, and leave all else for later.

What they write to is the log of the `Run` (see `replay/run.py`) that is under way in their thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Container
from typing import Any

from torch import nn

from fmapkit.instrumentation import Hook, nothing
from fmapkit.replay.call_taps import CallTap, KeepingCallTap, OutputCallTap, OutsideTap, stand
from fmapkit.torchlib.call_override import CallOverride, not_compiled
from fmapkit.torchlib.memory import version_of

__all__ = ["Cell", "CurrentRun", "KeepingTap", "OutputTap", "OutsideHook", "Tap"]

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


class CurrentRun(threading.local):
    """Where taps write to: the run that is under way in this thread.

    Per thread, so that a tap that fires in another one, which is not captured, finds nothing.

    Attributes:
        cell: None while no run is under way. Tensors are to be read: 0 as they are, 1 outside the
            graph, 2 with inference tensors among them, 3 outside of a graph that they may become
            part of, 4 both.
        run: that the cell is of.
    """

    cell: Cell | None = None
    run: Any = None


class Tap(Hook):
    """The hook of a site: notes z, a and their versions, and leaves all else for later.

    Args:
        line: to write to.
        other: called with the hook's arguments when no run is under way.
        fault: called with the module and the error, should we fail.
        owner: the session.
    """

    __slots__ = ("fault", "line")

    standing: type[CallTap] | None = CallTap  # what can take its place

    def __init__(self, line: CurrentRun, other: Any, fault: Any, owner: object) -> None:
        super().__init__(other, owner)
        self.line = line
        self.fault = fault

    def after(self, module: nn.Module) -> CallOverride:
        """Read the module's calls, at the least cost."""
        standing = stand(self.standing, module, self) if self.standing is not None else None
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
            x = args[0]
            if how:
                if how > 1:
                    if how > 2:
                        x, output = x.detach(), output.detach()
                    note((module, output, version_of(output), x, version_of(x)))
                    drop(None)
                    return
                if x.requires_grad:
                    x = x.detach()
                if output.requires_grad:
                    output = output.detach()
            note((module, output, output._version, x, x._version))
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


class OutputTap(Tap):
    """The same for a site of which only what the module returns is held."""

    __slots__ = ()

    standing = OutputCallTap

    @not_compiled
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        cell = self.line.cell
        if cell is None:
            self.call(module, args, output)
            return
        note, how, wanted, drop, _ = cell
        if module not in wanted:
            return
        try:
            if how and (output.requires_grad or how > 2):
                output = output.detach()
            note((module, output, version_of(output) if how > 1 else output._version))
            drop(None)
        except Exception as error:  # ours, not the user's: named in `missed`, never raised
            self.again(module, args, output, error)


class KeepingTap(Tap):
    """The same for an in-place nonlinearity: z is kept before it is overwritten.

    Only what stands before the call can do so.
    """

    __slots__ = ()

    standing = KeepingCallTap

    @not_compiled
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.line.cell is None:
            self.call(module, args, output)
        elif module in self.line.cell[2]:
            self.fault(module, RuntimeError("a hook saw z after it was overwritten"))


class OutsideHook(Tap):
    """Tells of a call outside of any run; inside of one, it notes nothing."""

    __slots__ = ()

    standing = OutsideTap

    @not_compiled
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.line.cell is None:
            self.call(module, args, output)
