"""A module with a fused path runs twice: fused for its output, and beside it, watched, for maps.

Which modules these are, and what the fused path returns, is a matter of `torchlib/fused_paths.py`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fmapkit.instrumentation import Hooks
from fmapkit.missed import MissedLog, Reason
from fmapkit.session.config import CaptureConfig
from fmapkit.session.state import MODES, PassState
from fmapkit.torchlib.fused_paths import fused_output, may_fuse
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
        self._runs = 0  # of edits, before
        self._edits = asked.edits
        self._names = asked.names
        self._live = live
        self._hooks = hooks
        self._misses = misses

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A module is about to run: run its fused path first, if it has one and torch would."""
        if self.module is not None or not may_fuse(module, MODES):
            return
        live = self._live
        if live.tracer is not None and live.tracer.lost:
            return
        paused = live.trace_off()
        lit = live.run is not None and live.run.light().pause()

        def bare() -> Any:
            with self._hooks.suspended(module.modules()):
                return module.forward(*args, **kwargs)

        fused, output = fused_output(module, args, kwargs, bare)
        if paused:
            live.trace_on()
        if lit and live.run is not None:
            live.run.light().resume()
        if fused:
            self.module, self._output = module, output
            self._runs = self._edits.runs

    def leave(self, output: Any, replaced: Any) -> Any:
        """The watched run has ended.

        Args:
            output: what it returned.
            replaced: what the tracer would have returned instead; None for the output.

        Returns:
            What is to be returned instead: the fused output, tagged as the watched run's own,
            unless something was edited in that.
        """
        module, fused = self.module, self._output
        self.clear()
        assert module is not None
        edited = self._edits.runs != self._runs
        reason = Reason.FUSED_PATH_EDITED if edited else Reason.FUSED_PATH
        self._misses.add(self._names.of(module), reason.text())
        if edited:
            return replaced
        tracer = self._live.tracer
        if tracer is None or self._live.run is not None:
            return fused
        for (_, ours), (_, theirs) in zip(leaves(output), leaves(fused), strict=False):
            tracer.trace.labels.put(theirs, tracer.trace.labels.of(ours))
        return fused

    def clear(self) -> None:
        """Nothing runs twice."""
        self.module = self._output = None
