"""What a module's hooks call: which pass a call belongs to, and who answers it.

That is told by what is under way. An answer's `enter` returns the arguments that a call is to get
instead, `leave` the output that is to be returned instead; None for its own. Calls of compiled code
are answered by `session/compiled_calls.py`.
"""

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
from fmapkit.replay import sizes_of
from fmapkit.session.parts import SessionParts
from fmapkit.session.passes import Passes
from fmapkit.torchlib.autograd import graph_task
from fmapkit.torchlib.fused.paths import fuses
from fmapkit.torchlib.nested import tensors_in
from fmapkit.tracing import Frame, Tracer

# Modules with thousands of names are memory to go through: what each pass asks is found here.
_thread: Callable[[], int] = threading.get_ident


class _OfParts:
    def __init__(self, parts: SessionParts) -> None:
        self._parts, self._live = parts, parts.live
        self._regions, self._region_calls = parts.regions, parts.region_calls


class AnswerOutside(_OfParts):
    """No pass is under way: a module of the model that runs now is named."""

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """A call begins."""
        asked, live = self._parts.asked, self._live
        if not live.idle and self._parts.unseen.stray(module) and asked.edits:
            asked.edits.refuse_outside(asked.names.of(module))
        return None

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any, failed: bool) -> Any:
        """It has ended; if it is the model's own, so has a pass that was not captured."""
        live = self._parts.live
        if module is self._parts.asked.model:
            if not live.leave_model():
                live.idle, live.frame = False, None
                self._parts.installer.listen()
        return None


class AnswerReplaying(_OfParts):
    """A region is replayed: only its taps look."""

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """A module inside the region begins, or the region calls itself."""
        run = self._live.run
        assert run is not None
        if module is run.module:
            self._live.enter_region()
        return self._region_calls.before(run, module, args, kwargs)

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any, failed: bool) -> Any:
        """It has ended; with the region's own call, the run ends."""
        live = self._live
        run, tracer = live.run, live.tracer
        assert run is not None
        if module is run.module and not (live.inner and live.leave_region()):
            self._region_calls.leave(args, kwargs, output, failed)
            if tracer is not None and tracer.editor:
                return tracer.editor.modules.leave_unit(module, output, failed)
            return None
        return self._region_calls.after(run, module, args, kwargs, output, failed)


class AnswerTracing(_OfParts):
    """The tracer sees the code of a module, and leaves the regions that it calls alone."""

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """A call begins: of a region, or of a module whose own code is seen."""
        tracer, regions = self._live.tracer, self._regions
        if (tracer is None or not tracer.lost) and regions.stands_alone(module, args, tracer):
            frames = tracer.trace.frames if tracer is not None else None
            regions.called(module, frames[-1].module if frames else None)
            return self._region_calls.enter(module, args, kwargs)
        # Regions may have become dynamic modules in this very pass.
        if tracer is not None and not tracer.lost:
            self._parts.installer.on_scopes()
        replaced = self._traced(module, args, kwargs)
        if tracer is not None and not tracer.lost:
            self._live.trace_on()
        return replaced

    def _traced(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """The tracer sees what the module runs, once it is on."""
        tracer = self._live.tracer
        if tracer is None:
            return None
        if tracer.lost:
            return tracer.editor.modules.input(module, args, kwargs) if tracer.editor else None
        if self._live.moving:
            self._live.moved(module, (args, kwargs))
        frame = tracer.modules.enter(module, args, kwargs)
        if self._live.recording is None:
            frame.position = self._parts.paths.position
        return frame.replaced

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any, failed: bool) -> Any:
        """It has ended."""
        tracer = self._live.tracer
        if tracer is None:
            return None
        if self._live.moving:
            self._live.moved(module, output)
        if not failed and self._regions.probation.watches(module):
            self._ended(module, tracer)
        return tracer.leave(module, None if failed else output)

    def _ended(self, module: nn.Module, tracer: Tracer) -> None:
        """Note which path a module took that is traced until it has taken one for long."""
        around: nn.Module | None = None
        frame: Frame | None = None
        for one in tracer.trace.frames:
            if one.module is module:
                caller, frame = around, one
            around = one.module
        if frame is not None:
            self._regions.called(module, caller)
            sizes = sizes_of(tensors_in(*frame.args, frame.kwargs), frame.args, frame.kwargs)
            items = self._parts.paths.since(frame.position)
            self._regions.probation.called(module, sizes, items)


class AnswerRecording(AnswerTracing):
    """A plan of a region is made: the tracer sees every function in it."""

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """A module inside the region begins, or the region calls itself."""
        recording = self._live.recording
        if recording is not None and module is recording.module:
            self._live.enter_region()
        return self._traced(module, args, kwargs)

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any, failed: bool) -> Any:
        """It has ended; with the region's own call, the plan is made."""
        live, recording = self._live, self._live.recording
        if recording is None or module is not recording.module or live.leave_region():
            return super().leave(module, args, kwargs, output, failed)
        tracer = live.tracer
        replaced = self._parts.recorder.leave(module, output, failed)
        if tracer is not None and tracer.editor:
            whole = output if replaced is None else replaced
            new = tracer.editor.modules.leave_unit(module, whole, failed)
            replaced = replaced if new is None else new
        return replaced


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

    def _answer(self) -> AnswerOutside | AnswerReplaying | AnswerTracing:
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
            if self._stop is not None and module is self._model and not live.depth:
                self._stop.run_out()
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
