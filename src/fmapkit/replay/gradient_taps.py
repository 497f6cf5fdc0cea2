"""Taps that also wait for gradients: those of `replay/taps.py`, for captures that ask for them."""

from __future__ import annotations

from typing import Any

from torch import nn

from fmapkit.replay.taps import Tap
from fmapkit.storage import watch
from fmapkit.torchlib.call_override import not_compiled
from fmapkit.torchlib.memory import version_of

__all__ = ["GradientOutputTap", "GradientTap"]


class GradientTap(Tap):
    """Notes z, a, their versions, and where their gradients will arrive."""

    __slots__ = ()

    standing = None

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
            note((module, *self.read(args, output, bool(how))))
            drop(None)
        except Exception as error:  # ours, not the user's: named in `missed`, never raised
            self.fault(module, error)

    def read(self, args: Any, output: Any, detach: bool) -> tuple[Any, ...]:
        """What is noted of a site. To watch a gradient costs more than this call."""
        x = args[0]
        grads = watch(output), watch(x)
        if detach:
            x, output = x.detach(), output.detach()
        return output, version_of(output), x, version_of(x), *grads


class GradientOutputTap(GradientTap):
    """The same for a site of which only what the module returns is held."""

    __slots__ = ()

    def read(self, args: Any, output: Any, detach: bool) -> tuple[Any, ...]:
        """What is noted of a site."""
        grad = watch(output)
        if detach:
            output = output.detach()
        return output, version_of(output), grad, None
