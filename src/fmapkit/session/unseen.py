"""What runs where no hook of a pass sees it, and the words it is named with.

That is code without Python (scripted, or recorded into a CUDA graph), and modules that somebody
calls outside of the captured model's forward.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from fmapkit.missed import MissedLog, Reason
from fmapkit.model import HOW, has_own_call
from fmapkit.session.config import CaptureConfig
from fmapkit.torchlib.autograd import in_backward
from fmapkit.torchlib.compiled_modules import dynamo_has_run
from fmapkit.torchlib.modes import (
    fx_is_tracing,
    jit_trace,
    make_fx_is_tracing,
    recorded_by_cuda,
)
from fmapkit.tracing import running_modules


def recorded() -> str:
    """Why a call is not captured: somebody records it, to run it without Python; empty if not."""
    if jit_trace() is not None:
        return Reason.RECORDED.text(function="torch.jit.trace")
    if torch.compiler.is_compiling():
        return Reason.RECORDED.text(function="torch.export")
    if make_fx_is_tracing():
        return Reason.RECORDED.text(function="make_fx")
    if recorded_by_cuda():
        return Reason.CUDA_GRAPH.text()
    return ""


class UnseenCalls:
    """Names what runs unseen."""

    def __init__(self, asked: CaptureConfig, misses: MissedLog) -> None:
        self._model = asked.model
        self._names = asked.names
        self._wants = asked.wants
        self._misses = misses

    def stray(self, module: nn.Module) -> bool:
        """A module runs outside of a pass: name the outermost one of the model that is running.

        It is not named where nothing in it was asked for. Returns whether it runs, and is no part
        of a pass that is not captured.
        """
        if in_backward() or recorded() or fx_is_tracing():
            return False
        at: Any = sys._getframe(1)
        while at is not None:
            if at.f_code is nn.Module._call_impl.__code__:
                running = at.f_locals["self"]
                module = running if running in self._names.by_module else module
            at = at.f_back
        if isinstance(module, ParametrizationList):  # somebody has read a weight
            return False
        if module is self._model:  # a pass of its own that is not captured, and says why
            return False
        method = self._names.past_hooks.method_of(self._model)
        if method is not None:
            self._misses.add("", Reason.PAST_HOOKS_PASS.text(how=HOW[method]))
            return True
        if not self._wants.any_in(module):
            return True
        name = self._names.of(module)
        hint = f": capture(model.{name})" if name else ""
        kind = type(self._model).__name__
        self._misses.add(name, Reason.OUTSIDE_OF_FORWARD.text(model=kind, hint=hint))
        return True

    def no_pass(self) -> None:
        """The block has ended and nobody has seen a pass: say so where one may have run."""
        if not self._misses.entries and dynamo_has_run():
            self._misses.add("", Reason.NO_CALL_SEEN.text())
        if has_own_call(self._model) and not isinstance(self._model, torch.jit.ScriptModule):
            reason = Reason.PAST_HOOKS_PASS.text(how=HOW["__call__"])
            self._misses.add("", reason)

    def scripted(self, compiled: bool) -> None:
        """Name scripted modules of whose calls nobody tells: all, where `compiled` code runs."""
        names = self._names
        for module, name in names.by_module.items():
            if isinstance(module, torch.jit.ScriptModule) and (compiled or not name):
                outer = names.by_name.get(name.rpartition(".")[0]) if "." in name else None
                if not isinstance(outer, torch.jit.ScriptModule):
                    self._misses.add(name, Reason.SCRIPTED.text())

    def scripted_call(self, function: str) -> None:
        """A scripted function is called in a pass: name it, at the module that it runs in."""
        running = self._running()
        if isinstance(running, torch.jit.ScriptModule):
            self._misses.add(self._names.of(running), Reason.SCRIPTED.text())
            return
        reason = Reason.SCRIPTED_FUNCTION.text(function=function)
        self._misses.add(self._names.of(running), reason)

    def compiled_call(self, function: str) -> None:
        """A function is called in a pass that torch.compile runs: the same."""
        reason = Reason.COMPILED_FUNCTION.text(function=function)
        self._misses.add(self._names.of(self._running()), reason)

    def _running(self) -> nn.Module:
        """The innermost module of the model's that runs."""
        inside = [m for m in running_modules(stop=None) if m in self._names.by_module]
        return inside[-1] if inside else self._model
