"""What a module's hooks call, and who answers.

    Pair, Hook -> ModuleCalls.pre -> Passes.begin              the model's call: a pass?
                              -> Answer.enter                  the answer of whoever is in charge
                  ModuleCalls.post -> Answer.leave
                                   -> Passes.end

Who is in charge is told by what is under way, innermost first:

    Replaying   a unit runs that there is a plan for: its taps are all there is
    Recording   a unit runs for which a plan is made: the tracer sees every function
    Tracing     a module that decides by data: the tracer sees its own code, and the units that it
                calls begin here
    Outside     no pass is under way

Calls of compiled code are answered by `session/compiled_calls.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

from torch import nn

from fmapkit.compiled import CompiledEntries
from fmapkit.errors import BudgetError, NonFiniteError
from fmapkit.instrumentation import FAILED
from fmapkit.missed import reason
from fmapkit.model import REPLICAS
from fmapkit.session.parts import Parts
from fmapkit.session.passes import Passes
from fmapkit.session.state import MODES
from fmapkit.torchlib.autograd import graph_task
from fmapkit.torchlib.fused_paths import may_fuse

__all__ = ["ModuleCalls"]

RAISED = (BudgetError, NonFiniteError)  # what the user has asked for, by `max_bytes=`, `check=`

# Modules with thousands of names are memory to go through: what each pass asks is found here.
_thread: Callable[[], int] = threading.get_ident


class Answer(Protocol):
    """Answers the calls of modules."""

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """A call begins.

        Returns:
            The arguments that it is to get instead; None for its own.
        """

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any, failed: bool) -> Any:
        """It has ended.

        Returns:
            The output that is to be returned instead; None for its own.
        """


class AnswerOutside:
    """No pass is under way: a module of the model that runs now is named."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """A call begins."""
        asked, live = self._parts.asked, self._parts.live
        if not live.idle and self._parts.unseen.stray(module) and asked.edits:
            asked.edits.refuse_outside(asked.names.of(module))
        return None

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any, failed: bool) -> Any:
        """It has ended; if it is the model's own, so has a pass that was not captured."""
        live = self._parts.live
        if module is self._parts.asked.model:
            if live.depth:
                live.depth -= 1
            else:
                live.idle, live.frame = False, None
        return None


class AnswerReplaying:
    """A unit is replayed: only its taps look."""

    def __init__(self, parts: Parts) -> None:
        self._live = parts.live
        self._replaying = parts.replaying

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """A module inside the unit begins, or the unit calls itself."""
        run = self._live.run
        assert run is not None
        if module is run.module:
            self._live.inner += 1
        self._replaying.before(run, module, args, kwargs)
        return None

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any, failed: bool) -> Any:
        """It has ended; with the unit's own call, the run ends."""
        live = self._live
        run, tracer = live.run, live.tracer
        assert run is not None
        if module is run.module and not live.inner:
            self._replaying.leave(args, kwargs, output)
            if tracer is not None and tracer.editor:
                return tracer.editor.modules.leave_unit(module, output, failed)
            return None
        if module is run.module:
            live.inner -= 1
        self._replaying.after(run, module, args, kwargs, output, failed)
        return None


class AnswerTracing:
    """The tracer sees the code of a module, and leaves the units that it calls alone."""

    def __init__(self, parts: Parts) -> None:
        self._live = parts.live
        self._parts = parts

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """A call begins: of a unit, or of a module whose own code is seen."""
        tracer, units = self._live.tracer, self._parts.units
        if tracer is None or not tracer.lost:
            if units.stands_alone(module, args, tracer):
                units.direct.add(module)
                return self._parts.replaying.enter(module, args, kwargs)
        return self._traced(module, args, kwargs)

    def _traced(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """The tracer sees what the module runs."""
        live, parts = self._live, self._parts
        tracer = live.tracer
        if tracer is None:
            return None
        if tracer.lost:
            return tracer.editor.modules.enter_lost(module, args, kwargs) if tracer.editor else None
        if may_fuse(module, MODES):
            parts.beside.enter(module, args, kwargs)
        parts.moves.made(module, (args, kwargs))
        frame = tracer.enter(module, args, kwargs)
        live.trace_on()
        return frame.replaced

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any, failed: bool) -> Any:
        """It has ended."""
        tracer, parts = self._live.tracer, self._parts
        if tracer is None:
            return None
        parts.moves.made(module, output)
        replaced = tracer.leave(module, None if failed else output)
        if module is parts.beside.module:
            replaced = parts.beside.leave(output, replaced)
        return replaced


class AnswerRecording(AnswerTracing):
    """A plan of a unit is made: the tracer sees every function in it."""

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """A module inside the unit begins, or the unit calls itself."""
        if module is self._live.unit():
            self._live.inner += 1
        return self._traced(module, args, kwargs)

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any, failed: bool) -> Any:
        """It has ended; with the unit's own call, the plan is made."""
        live = self._live
        if module is not live.unit():
            return super().leave(module, args, kwargs, output, failed)
        if live.inner:
            live.inner -= 1
            return super().leave(module, args, kwargs, output, failed)
        tracer = live.tracer
        replaced = self._parts.recorder.leave(module, output, failed)
        if tracer is not None and tracer.editor:
            whole = output if replaced is None else replaced
            new = tracer.editor.modules.leave_unit(module, whole, failed)
            replaced = replaced if new is None else new
        return replaced


class ModuleCalls:
    """What the hooks of one capture call.

    Args:
        parts: of the capture.
        passes: begins and ends them.
        compiled: the entries at compiled modules.
    """

    def __init__(self, parts: Parts, passes: Passes, compiled: CompiledEntries) -> None:
        self._parts = parts
        self._passes = passes
        self._compiled = compiled
        self._live = parts.live
        self._model = parts.asked.model
        self._edits, self._stop = parts.asked.edits or None, parts.asked.stop
        self._outside = AnswerOutside(parts)
        self._replaying = AnswerReplaying(parts)
        self._recording = AnswerRecording(parts)
        self._tracing = AnswerTracing(parts)

    def _answer(self) -> Answer:
        """Whoever answers calls of modules now."""
        live = self._live
        if live.run is not None:
            return self._replaying
        if live.lesson is not None:
            return self._recording
        return self._outside if live.current is None else self._tracing

    # -- a module's call ----------------------------------------------------------------------

    def pre(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """A module's call begins.

        Returns:
            The arguments that it is to get instead; None for its own.
        """
        live = self._live
        if _thread() != live.thread or graph_task() != -1:
            self._elsewhere(module)
            return None
        if self._edits and self._edits.running:
            return None
        try:
            if module is self._model:
                if self._passes.running():
                    live.depth += 1
                elif not self._passes.begin(args, kwargs):
                    return None
                elif live.tracer is None:  # it is a unit, and `begin` has looked at the arguments
                    self._parts.units.direct.add(module)
                    return self._parts.replaying.enter(module, args, kwargs)
            return self._answer().enter(module, args, kwargs)
        except Exception as error:  # ours, not the user's: named in `missed`, never raised
            self.fault(module, error)
        return None

    def post(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """A module's call has ended; the output is `FAILED` after an `Exception`.

        Returns:
            The output that is to be returned instead; None for its own.
        """
        live = self._live
        if _thread() != live.thread or graph_task() != -1:
            return None
        if self._edits and self._edits.running:
            return None
        replaced = None
        failed = output is FAILED
        answer = self._answer()
        try:
            replaced = answer.leave(module, args, kwargs, None if failed else output, failed)
            if answer is self._outside:
                return None
            if module is self._model:
                if live.depth:
                    live.depth -= 1
                else:
                    self._passes.end(failed)
            elif self._stop is not None and live.run is None and live.lesson is None:
                self._stop.check()
        except Exception as error:
            if module is self._model and not live.depth:
                self._passes.abandon()
            self.fault(module, error)
        return replaced

    def _elsewhere(self, module: nn.Module) -> None:
        """A module runs in another thread, or in a backward."""
        live = self._live
        if "_is_replica" in module.__dict__:
            self._parts.misses.add("", REPLICAS)
            if self._edits:
                raise self._edits.refused(REPLICAS)
        elif live.lesson is not None and _thread() == live.thread:
            live.lesson.key = None  # it runs again in a backward: no tap could tell that apart

    # -- other hooks --------------------------------------------------------------------------

    def tap(self, module: nn.Module, args: Any, output: Any) -> None:
        """A module that carries a site has run."""
        live = self._live
        run = live.run
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
        self._parts.misses.add(asked.names.of(module), reason(error))
        if live.run is not None:
            live.run.stray(type(error).__name__)
