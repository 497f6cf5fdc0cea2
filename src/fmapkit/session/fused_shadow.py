"""A module with a fused path runs twice: fused for its output, and beside it, watched, for maps.

Which modules these are, and what the fused path returns, is a matter of `torchlib/fused_paths.py`.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import Any

from torch import nn

from fmapkit.instrumentation import Hooks
from fmapkit.missed import MissedLog, Reason
from fmapkit.session.config import CaptureConfig
from fmapkit.session.state import PassState
from fmapkit.torchlib.fused_paths import beside, fused_output, may_fuse, runners
from fmapkit.torchlib.nested import leaves

__all__ = ["FusedPathShadow"]


class FusedPathShadow:
    """The module that runs unfused beside its fused path.

    Attributes:
        module: it; None while there is none.
    """

    def __init__(
        self, asked: CaptureConfig, live: PassState, hooks: Hooks, misses: MissedLog
    ) -> None:
        self.module: nn.Module | None = None
        self._output: Any = None
        self._outer: Any = None
        self._runs = 0  # of edits, before
        self._edits = asked.edits
        self._names = asked.names
        self._live = live
        self._hooks = hooks
        self._misses = misses

    def begin(self) -> None:
        """A pass begins: where the model's own code calls a forward that may fuse, `run` does."""
        self._outer = runners.get(self._live.thread)  # another capture's
        runners[self._live.thread] = self.run

    def end(self) -> None:
        """The pass has ended, by whatever way."""
        self.clear()
        if runners.get(self._live.thread) == self.run:
            del runners[self._live.thread]
            if self._outer is not None:
                runners[self._live.thread] = self._outer
        self._outer = None

    def run(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """The model's own code calls one of the forwards, past the module's call or inside it."""
        forward = getattr(function, "__func__", function)
        module, given = getattr(function, "__self__", None), args
        if module is None and args:
            module, given = args[0], args[1:]
        if self._outer is not None:
            function = partial(self._outer, function)
        mine = False
        if self.module is None and module is not None and not self._edits.running:
            self._begin(forward, module, given, kwargs)
            mine = self.module is not None
        try:
            output = function(*args, **kwargs)
        except BaseException:
            if mine:
                self.clear()
            raise
        return self.leave(output) if mine else output

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A module that has a fused path is about to run: run that first, if torch would."""
        run = self._live.run
        wanted = run is None or module in run.plan.fusing
        if self.module is None and wanted:
            self._begin(type(module).forward, module, args, kwargs)

    def _begin(self, forward: Any, module: nn.Module, args: Any, kwargs: Any) -> None:
        live = self._live
        if not may_fuse(module) or (live.tracer is not None and live.tracer.lost):
            return
        self.module = module  # and of what runs in it, nothing runs twice
        paused = live.trace_off()
        mode = live.run.mode if live.run is not None else None
        lit = mode is not None and mode.pause()
        fused = False

        def bare() -> Any:
            with self._hooks.suspended(module.modules()):
                return forward(module, *args, **kwargs)

        try:
            with suppress(Exception):  # the user's: as the model runs now, it comes up again
                fused, self._output = fused_output(forward, module, args, kwargs, bare)
        finally:
            if not fused:
                self.clear()
            if paused:
                live.trace_on()
            if mode is not None and lit:
                mode.resume()
        if fused:
            self._runs = self._edits.runs
            beside.add(live.thread)

    def leave(self, output: Any, failed: bool = False) -> Any:
        """The watched run has ended.

        Args:
            output: what it returned.
            failed: by an exception, and returned nothing.

        Returns:
            What goes on in its place: the fused output, which carries what the watched run's does;
            that one's own, where something was edited in it.
        """
        module, fused = self.module, self._output
        self.clear()
        assert module is not None
        edited = self._edits.runs != self._runs
        reason = Reason.FUSED_PATH_EDITED if edited else Reason.FUSED_PATH
        self._misses.add(self._names.of(module), reason.text())
        if edited or failed:
            return output
        tracer = self._live.tracer
        if tracer is not None and self._live.run is None:
            for (_, ours), (_, theirs) in zip(leaves(output), leaves(fused), strict=False):
                tracer.trace.labels.put(theirs, tracer.trace.labels.of(ours))
        return fused

    def clear(self) -> None:
        """Nothing runs twice."""
        beside.discard(self._live.thread)
        self.module = self._output = None
