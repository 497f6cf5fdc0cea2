"""What a module's hooks call: which pass a call belongs to, and who answers it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

from torch import nn

from fmapkit.compiled import CompiledEntries
from fmapkit.instrumentation import FAILED, Returned
from fmapkit.missed import RAISED, reason
from fmapkit.model import REPLICAS
from fmapkit.session.answers import (
    Answer,
    AnswerOutside,
    AnswerRecording,
    AnswerReplaying,
    AnswerTracing,
)
from fmapkit.session.parts import SessionParts
from fmapkit.session.passes import Passes
from fmapkit.torchlib.autograd import graph_task
from fmapkit.torchlib.fused.paths import fuses

# Modules with thousands of names are memory to go through: what each pass asks is found here.
_thread: Callable[[], int] = threading.get_ident


class HookDispatcher:
    """What the hooks of one capture call."""

    def __init__(self, parts: SessionParts, passes: Passes, compiled: CompiledEntries) -> None:
        self._parts = parts
        self._passes = passes
        self._compiled = compiled
        self._live = parts.live
        self._model = parts.asked.model
        self._edits, self._stop = parts.asked.edits or None, parts.asked.stop
        self._fused = parts.fused
        self._outside = AnswerOutside(parts)
        self._replaying = AnswerReplaying(parts)
        self._recording = AnswerRecording(parts)
        self._tracing = AnswerTracing(parts)

    def _answer(self) -> Answer:
        """Whoever answers calls of modules now."""
        live = self._live
        if live.run is not None:
            return self._replaying
        if live.recording is not None:
            return self._recording
        return self._outside if live.current is None else self._tracing

    # -- a module's call ----------------------------------------------------------------------

    def pre(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """A module's call begins; the arguments that it is to get instead, None for its own."""
        live = self._live
        if _thread() != live.thread or graph_task() != -1:
            self._elsewhere(module)
            return None
        if self._edits and self._edits.running:
            return None
        try:
            if module is self._model:
                if live.frame is not None and self._passes.running():
                    live.enter_model()
                elif not self._passes.begin(args, kwargs):
                    return None
                elif live.tracer is None:  # it is a region, and `begin` has looked at the arguments
                    if module not in self._parts.regions.direct:
                        self._parts.regions.called(module, None)
                    enter = self._parts.region_calls.enter
                    if fuses(module):
                        return self._enter_fusing(enter, module, args, kwargs)
                    return enter(module, args, kwargs)
            live_recording = live.recording is not None and live.run is None
            answer = self._recording if live_recording else self._answer()
            if fuses(module) and answer is not self._outside:
                return self._enter_fusing(answer.enter, module, args, kwargs)
            return answer.enter(module, args, kwargs)
        except Exception as error:  # ours, not the user's: named in `missed`, never raised
            self.fault(module, error)
        return None

    def _enter_fusing(
        self, enter: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any
    ) -> Any:
        """A call begins, in a pass, of a module that may run by its fused path."""
        if self._edits:  # what they change as it begins, its fused path is not given
            self._fused.enter(module, args, kwargs)
            return enter(module, args, kwargs)
        enter(module, args, kwargs)
        return self._fused.enter(module, args, kwargs)

    def post(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """A module's call has ended; the output that is to be returned instead, None for its own.

        Its output is `FAILED` after an `Exception`.
        """
        live = self._live
        if _thread() != live.thread or graph_task() != -1:
            return None
        if self._edits and self._edits.running:
            return None
        replaced = None
        outlived, failed = False, output is FAILED
        # Most calls that end are those of regions that are replayed.
        answer = self._replaying if live.run is not None else self._answer()
        try:
            if module is self._fused.module:
                outlived = failed and self._fused.outlives(sys.exc_info()[1])
                failed = failed and not outlived
                replaced = output = self._fused.leave(output, failed)
            new = answer.leave(module, args, kwargs, None if failed else output, failed)
            if answer is self._outside:
                return None
            replaced = replaced if new is None else new
            if module is self._model:
                if not live.leave_model():
                    self._passes.end(failed)
            elif self._stop is not None and live.run is None and live.recording is None:
                self._stop.check()
        except Exception as error:
            if module is self._model and not live.depth:
                self._passes.abandon()
            self.fault(module, error)
        return Returned(replaced) if outlived else replaced

    def _elsewhere(self, module: nn.Module) -> None:
        """A module runs in another thread, or in a backward."""
        live = self._live
        if "_is_replica" in module.__dict__:
            self._parts.misses.add("", REPLICAS)
            if self._edits:
                raise self._edits.refused(REPLICAS)
        elif live.recording is not None and _thread() == live.thread:
            live.recording.form = None  # it runs again in a backward: no tap could tell that apart

    # -- other hooks --------------------------------------------------------------------------

    def tap(self, module: nn.Module, args: Any, output: Any) -> None:
        """A module that carries a site has run."""
        live = self._live
        run = live.run
        if self._edits and self._edits.running and _thread() == live.thread:
            return
        if run is None or _thread() != live.thread:
            if _thread() == live.thread and live.current is None and not live.idle:
                self._parts.unseen.stray(module)
            return
        if graph_task() != -1 or module not in run.plan.taps:
            return
        try:
            run.tap(module, args, None, output)
        except Exception as error:
            self.fault(module, error)

    def scripted(self, function: str) -> None:
        """A scripted function, of a name, is called."""
        live = self._live
        if live.current is not None and _thread() == live.thread and graph_task() == -1:
            self._parts.unseen.scripted_call(function)

    def overwritten(self) -> None:
        """`module.compile()` has taken the place before the model's own call."""
        try:
            self._compiled.add_new()
        except Exception as error:  # raised here, it would be printed and lost
            self.fault(self._model, error)

    def fault(self, module: nn.Module, error: Exception) -> None:
        """An error came up while we looked: ours is named; what the user asked for is raised."""
        asked, live = self._parts.asked, self._live
        if error in (asked.edits.raised, asked.analyses.raised) or isinstance(error, RAISED):
            asked.edits.raised = asked.analyses.raised = None  # whose traceback holds tensors
            raise error
        if live.run is not None:  # whether it is ours shows as the call ends
            live.run.fail(module, error)
        else:
            self._parts.misses.add(asked.names.of(module), reason(error))
