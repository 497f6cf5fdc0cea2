"""Who answers the calls of a capture's modules, by what is under way.

`session/dispatch.py` asks one of them: `enter` returns the arguments that a call is to get instead,
`leave` the output that is to be returned instead; None for its own. Calls of compiled code are
answered by `session/compiled_calls.py`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fmapkit.replay import sizes_of
from fmapkit.session.parts import SessionParts
from fmapkit.torchlib.nested import tensors_in
from fmapkit.tracing import Frame, Tracer


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


Answer = AnswerOutside | AnswerReplaying | AnswerTracing
