"""One capture at work: from the model's forward to the store.

A pass begins with the model's pre hook and ends with its post hook. In between, each module is

- a *unit*: the outermost module on its branch whose path is the same in each pass. Its first call
  of a kind is learned by the tracer; later ones are replayed by a `Run`, with one tap per site;
- a *scope*: a module that decides by data, or takes several paths. The tracer watches its own
  forward in every pass, and leaves the units in it alone;
- inside a unit, where only taps are set.

Here is what every hook calls, and when a pass begins and ends. The work is done by the stages
below: what is a unit (`_units.py`), where hooks stand (`_placing.py`), learning (`_learning.py`),
replaying (`_replaying.py`) and what becomes of the maps (`_keeping.py`). They share what is under
way (`_live.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fmapkit._asked import Asked
from fmapkit._attention import NONE_SEEN
from fmapkit._beside import Beside
from fmapkit._budget import Budget
from fmapkit._compiled import Compiled
from fmapkit._frames import call_frame, on_stack
from fmapkit._fused import may_fuse
from fmapkit._hooks import FAILED, Hooks
from fmapkit._keeping import Keeping
from fmapkit._learning import Learning
from fmapkit._live import MODES, Live
from fmapkit._methods import Methods
from fmapkit._missed import Misses, reason
from fmapkit._moves import Moves
from fmapkit._optimized import ever_compiled, in_compiled_code
from fmapkit._others import entered, left, others
from fmapkit._placing import Calls, Placing
from fmapkit._replaying import Replaying
from fmapkit._scripted import tell, tell_no_more
from fmapkit._standing import hide_from_scripting, show_to_scripting
from fmapkit._stop import CUT, StoppedError
from fmapkit._store import Pass, Store
from fmapkit._transforms import TRANSFORMED, transforming, under_transform
from fmapkit._units import Units
from fmapkit._unseen import Unseen, recorded
from fmapkit._wants import Wants
from fmapkit._watch import Watch
from fmapkit._weights import versions
from fmapkit._wrappers import REPLICAS
from fmapkit.errors import BudgetError, NonFiniteError
from fmapkit.paths import ControlPaths

__all__ = ["Session"]

RAISED = (BudgetError, NonFiniteError)  # what the user has asked for, by `max_bytes=`, `check=`

# Modules with thousands of names are memory to go through: what each pass asks is found here.
_graph_task: Callable[[], int] = torch._C._current_graph_task_id
_thread: Callable[[], int] = threading.get_ident


def _goes_gradually(model: nn.Module, wants: Wants) -> bool:
    """Whether the oldest pass goes map by map, as the new ones come.

    Copies have memory that is made once, and graphs are to go as soon as they can. The CPU's
    allocator alone gives memory back to the system.
    """
    if wants.graph or wants.retention or wants.filters is not None:
        return False
    first = next(model.parameters(), None)
    return first is None or first.is_cpu


class Session:
    """The life of one `with capture(model)` block.

    Args:
        asked: by the capture.
        given: the model as it was given; what `torch.compile` returned, or a plain one.
        keep: how many passes stay readable; None for all of them.
        every: capture each n-th pass.
        budget: how many bytes the maps may take; None for any.

    Attributes:
        asked: by the capture.
        live: what is under way.
        missed: what ran and was not captured.
        steps: how many passes have begun, captured or not.
        ids: of the inputs of the next pass, where the user has numbered them.
        store: where passes are kept.
        paths: which decisions passes take.
        unseen: names what runs outside of passes.
        watch: whether the model is still the one that was learned.
    """

    def __init__(
        self,
        asked: Asked,
        given: nn.Module,
        keep: int | None = 1,
        every: int = 1,
        budget: Budget | None = None,
    ) -> None:
        self.asked = asked
        # What is read at each turn is here at first hand.
        self.model, self.names, self.wants = asked.model, asked.names, asked.wants
        self._edits, self._stop = asked.edits or None, asked.stop
        self._every = every
        self._gradually = _goes_gradually(self.model, self.wants)
        if asked.stop is not None:
            asked.stop.awaited = lambda: any(o.waits for o in others(self))
        self.steps = 0
        self.ids: Tensor | None = None  # of the inputs of the pass to come
        self.store = Store(keep)
        self._misses = Misses(self.model)
        self.missed, self.miss = self._misses.entries, self._misses.add
        self.quiet = self._misses.quiet
        self.hooks = Hooks(self, self._broken_off)
        self.unseen = Unseen(asked, self._misses)
        self.paths = ControlPaths(self.model, self.names.place_of, self._who_runs)
        self.live = Live(asked, self._misses, self.paths)
        self.compiled = Compiled(self, given)
        self.watch = Watch(self.model, self.hooks)  # since `names` were read
        self._methods = Methods(
            self.model,
            asked.methods,
            (self._inside, self._pre, self._post, self._broken_off),
        )
        self._moves = Moves(self.live)
        self._beside = Beside(asked, self.live, self.hooks, self._misses)
        self._units = Units(self.hooks.is_ours)
        calls = Calls(
            self._pre,
            self._post,
            self._tap,
            self._fault,
            self._overwritten,
        )
        self._placing = Placing(asked, self.hooks, self._units, self._moves, calls)
        self._learning = Learning(
            asked, self.live, self._misses, self._units, self._placing, self.paths
        )
        self._keeping = Keeping(asked, self.live, self._misses, self.store, budget)
        self._replaying = Replaying(
            asked,
            self.live,
            self._misses,
            self._units,
            self._placing,
            self._learning,
            self._keeping,
            self.paths,
        )

    def _who_runs(self) -> list[nn.Module]:
        tracer = self.live.tracer
        return [frame.module for frame in tracer.frames] if tracer is not None else []

    @property
    def thread(self) -> int:
        """The one whose passes are captured."""
        return self.live.thread

    # -- life cycle ---------------------------------------------------------------------------

    def open(self) -> None:
        """Set the one hook pair that every pass goes through.

        Until the first pass, there are hooks on all modules, to name what is called outside of one.

        Raises:
            CaptureStateError: another capture is open, and one of the two edits.
        """
        self.live.thread = _thread()
        entered(self)
        self._open_always()
        tell(self._scripted)
        self._placing.on_model()
        self._methods.stand()
        hide_from_scripting()
        self.compiled.open()
        self.unseen.scripted(bool(self.compiled))
        if not self.compiled:  # dynamo compares what stands before a call
            self._placing.early()

    def close(self, failed: bool = False) -> None:
        """Remove everything, however the block ended; a warning never replaces its exception."""
        left(self)
        self._methods.leave()
        tell_no_more(self._scripted)
        self.abandon()
        self.compiled.close()
        self.hooks.drop()
        show_to_scripting()
        self._units.clear()
        self.paths.clear()
        self.wants.retention.close()
        self.asked.analyses.view = None
        if not self.steps:
            self.unseen.no_pass()
        if not failed:
            self._misses.warn()

    def _open_always(self) -> None:
        """Trace in every pass where inputs or outputs are edited, and methods are called."""
        if self._edits:
            self._units.open(*self._edits.modules())
        if self._methods:
            self._units.open(self.model)

    def uncover(self) -> None:
        """The model is being compiled: nothing of ours inside."""
        if not self.steps:
            self.hooks.drop("around", keep=[self.model])

    # -- hooks --------------------------------------------------------------------------------

    def _pre(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        live = self.live
        if _thread() != live.thread or _graph_task() != -1:
            if "_is_replica" in module.__dict__:
                self.miss("", REPLICAS)
                if self._edits:
                    raise self._edits.refused(REPLICAS)
            elif live.lesson is not None and _thread() == live.thread:
                live.lesson.key = None  # it runs again in a backward: no tap could tell that apart
            return None
        if self._edits and self._edits.running:
            return None
        try:
            if module is self.model and not self._running():
                if not self.begin(args, kwargs):
                    return None
                if live.tracer is None:  # it is a unit, and `begin` has looked at what it is given
                    self._units.direct.add(module)
                    return self._replaying.enter(module, args, kwargs)
            elif module is self.model:
                live.depth += 1
            if live.current is None:
                if not live.idle and self.unseen.stray(module) and self._edits:
                    self._edits.refuse_outside(self.names.of(module))
                return None
            if module is live.unit():
                live.inner += 1
            if live.run is not None:
                self._replaying.before(live.run, module, args, kwargs)
            elif live.tracer is not None and live.tracer.lost:
                editor = live.tracer.editor
                return editor.modules.enter_lost(module, args, kwargs) if editor else None
            elif live.lesson is None and self._units.stands_alone(module, args, live.tracer):
                self._units.direct.add(module)
                return self._replaying.enter(module, args, kwargs)
            elif live.tracer is not None:
                if may_fuse(module, MODES):
                    self._beside.enter(module, args, kwargs)
                self._placing.on_scopes()  # units may have become scopes in this very pass
                self._moves.made(module, (args, kwargs))
                frame = live.tracer.enter(module, args, kwargs)
                live.trace_on()
                return frame.replaced
        except Exception as error:  # ours, not the user's: named in `missed`, never raised
            self._fault(module, error)
        return None

    def _post(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        live = self.live
        if _thread() != live.thread or _graph_task() != -1:
            return None
        if self._edits and self._edits.running:
            return None
        replaced = None
        failed = output is FAILED
        if failed:
            output = None
        try:
            if live.current is None:
                if module is self.model and live.depth:
                    live.depth -= 1
                elif module is self.model:
                    live.idle, live.frame = False, None
                return None
            tracer = live.tracer
            ends = module is live.unit() and not live.inner
            if module is live.unit() and not ends:
                live.inner -= 1
            if live.run is not None and ends:
                self._replaying.leave(args, kwargs, output)
                if tracer is not None and tracer.editor:
                    replaced = tracer.editor.modules.leave_unit(module, output, failed)
            elif live.run is not None:
                self._replaying.after(live.run, module, args, kwargs, output, failed)
            elif ends:
                replaced = self._learning.leave(module, output, failed)
                if tracer is not None and tracer.editor:
                    whole = output if replaced is None else replaced
                    new = tracer.editor.modules.leave_unit(module, whole, failed)
                    replaced = replaced if new is None else new
            elif live.tracer is not None:
                self._moves.made(module, output)
                replaced = live.tracer.leave(module, None if failed else output)
                if module is self._beside.module:
                    replaced = self._beside.leave(output, replaced)
            if module is self.model:
                if live.depth:
                    live.depth -= 1
                else:
                    self.end(failed)
            elif self._stop is not None and live.run is None and live.lesson is None:
                self._stop.check()
        except Exception as error:
            if module is self.model and not live.depth:
                self.abandon()
            self._fault(module, error)
        return replaced

    def _tap(self, module: nn.Module, args: Any, output: Any) -> None:
        live = self.live
        run = live.run
        if run is None or _thread() != live.thread:
            self._outside(module)
            return
        if _graph_task() != -1:
            return
        if module not in run.plan.taps:
            return
        try:
            run.tap(module, args, None, output)
        except Exception as error:
            self._fault(module, error)

    def _outside(self, module: nn.Module) -> None:
        live = self.live
        if _thread() == live.thread and live.current is None and not live.idle:
            self.unseen.stray(module)

    def _scripted(self, function: str) -> None:
        if self.live.current is not None and _thread() == self.live.thread and _graph_task() == -1:
            self.unseen.scripted_call(function)

    def _overwritten(self) -> None:
        try:
            self.compiled.compiled_inside()
        except Exception as error:  # raised here, it would be printed and lost
            self._fault(self.model, error)

    def _fault(self, module: nn.Module, error: Exception) -> None:
        edits, analyses = self.asked.edits, self.asked.analyses
        if error in (edits.raised, analyses.raised) or isinstance(error, RAISED):
            edits.raised = analyses.raised = None  # whose traceback holds tensors
            raise error  # the user's own function, or what the user has asked for
        self.miss(self.names.of(module), reason(error))
        if self.live.run is not None:
            self.live.run.stray(type(error).__name__)

    # -- a pass -------------------------------------------------------------------------------

    def _inside(self) -> bool:
        """Whether a call of one of the model's methods is no pass of its own."""
        live = self.live
        return _thread() != live.thread or live.idle or _graph_task() != -1 or self._running()

    def _running(self) -> bool:
        """Whether a pass is under way; one that ended without its post hook is cleared away."""
        if self.live.frame is None:
            return False
        if on_stack(self.live.frame):
            return True
        self.abandon()
        return False

    def _broken_off(self, module: nn.Module, error: BaseException) -> bool | None:
        """A call has ended, by what is no `Exception`: an interrupt, or an early stop.

        The user's code may catch an interrupt inside the block, to save the model for instance: our
        modes and flags must be off before it does. So may the model's own code, and go on.

        Returns:
            Whether the call returns None in place of raising that; None if it is a part of the pass
            that ended as by any exception.
        """
        if _thread() != self.live.thread:
            return False
        if module is not self.model and self._edits and not isinstance(error, StoppedError):
            self._edits.broken_off = True
        if module is not self.model or self.live.depth:  # what called it may go on
            if not isinstance(error, StoppedError):
                return None
            self.live.depth -= module is self.model
            return False
        if isinstance(error, StoppedError):
            if error.stop is self._stop:
                self._ended_early()
                return True
            self.cut()
        elif self.live.current is not None:
            self.abandon()
        self.live.idle = False
        return False

    def _refused(self, args: Any, kwargs: Any, compiled: bool) -> bool:
        """Whether the pass cannot be captured as a whole; if so, it is named."""
        self.live.idle = False
        if not compiled and ever_compiled() and in_compiled_code():
            self.compiled.noticed()
            why = "it runs in code that torch.compile has compiled"
        elif transforming() and under_transform(self.model, (args, kwargs)):
            self.miss("", why := TRANSFORMED)
        elif why := recorded():
            self.miss("", why)
        else:
            return False
        if self._edits:
            raise self._edits.refused(why)
        return True

    def begin(self, args: Any, kwargs: Any, compiled: bool = False) -> bool:
        """A call of the model begins.

        Args:
            args: its positional arguments.
            kwargs: its keyword arguments.
            compiled: it runs compiled code.

        Returns:
            Whether it is a pass to be captured.
        """
        live, step = self.live, self.steps
        ids, self.ids = self.ids, None
        self.steps += 1
        live.idle = bool(step % self._every) or self._refused(args, kwargs, compiled)
        if live.idle:
            # torch.export sees to it that the model has the same attributes before and after.
            if not torch.compiler.is_compiling():
                self._placing.only_on_model()
            if self._methods:  # which may call the model, as a part of this pass
                live.frame = call_frame()
            return False
        live.frame = call_frame()  # on Python's stack as long as the pass runs
        if self.watch.changed():
            self._restart()
        live.current = self.store.begin(
            step, self.model.training, gradually=self._gradually and not compiled
        )
        live.current.ids = ids
        if self.wants.weights:
            live.current.weights = {}
        if self._edits:
            self._edits.begin(live.current.grads)
        if self._stop is not None:
            self._stop.begin()
        if compiled:
            self._placing.only_on_model()
            live.enter_compiled(args, kwargs)
            return True
        self.paths.begin()
        if not self._units.static(self.model):
            self._placing.on_scopes()
            live.new_tracer().enter_inputs(args, kwargs)
            live.trace_on()
        return True

    def end(self, failed: bool) -> None:
        """The pass has ended.

        Args:
            failed: by an exception.
        """
        live, stop, misses = self.live, self._stop, self._misses
        current = live.current
        lost = live.tracer is not None and live.tracer.lost
        self.paths.end()
        if live.tracer is not None:
            self._learning.finish(live.tracer, failed)
            self._moves.clear()
        if current is not None and not failed:
            if self.wants.picks and not self.store.fleeting:
                self._name_unpicked(current)
            if self.wants.kind("attention") and not (stop is not None and stop.ended):
                self._name_without_attention(current)
            if stop is not None:
                stop.learn(current)
        live.clear()
        self.store.end()
        if current is not None:
            current.closed = True
            if current.weights is not None:
                current.weights.update(versions(self.names.by_module))
            if self.wants.gradients:
                self._keeping.name_spoiled(current)
            self._keeping.keep(current, failed)
        if misses.entries and not misses.warned:
            misses.warn_in_forward()
        if self._edits and current is not None and not failed:
            if not (stop is not None and stop.ended):
                self._edits.check_done(current.step, lost)

    def _name_unpicked(self, current: Pass) -> None:
        named = {entry.layer for entry in self.missed}
        for layer in self.wants.without_maps({e.origin.name for e in current.entries()} | named):
            self.miss(layer, "filters= was given for it, and this pass had no map of it")

    def _name_without_attention(self, current: Pass) -> None:
        seen = {e.origin.name for e in current.entries() if e.kind == "attention"}
        named = {entry.layer for entry in self.missed}
        for layer in self.wants.without_attention(seen | named):
            self.miss(layer, NONE_SEEN)

    def abandon(self) -> None:
        """The pass ended without its post hook: leave no mode, flag or learning hook behind."""
        live = self.live
        if live.run is not None:
            live.run.finish()
            if live.current is not None:  # what was captured so far stays readable
                live.current.segments.append(live.run)
        self.paths.end()
        self._learning.drop()
        self._moves.clear()
        current = live.current
        live.clear()
        self.store.end()
        if current is not None:
            current.closed = True
            if current.weights is not None:
                current.weights.update(versions(self.names.by_module))
            self._keeping.keep(current, failed=True)
        self._beside.clear()
        live.idle = False

    def _ended_early(self) -> None:
        """Our stop has ended a pass, for whoever captures it, too."""
        for other in others(self):
            other.cut()

    @property
    def waits(self) -> bool:
        """Whether we are to end the pass that is under way, and want more of it yet."""
        live, stop = self.live, self._stop
        if stop is None or live.current is None or stop.complete:
            return False
        return live.tracer is not None or live.run is None or not live.run.complete

    def cut(self) -> None:
        """Another capture has ended this pass, or a part of it: nothing more is captured of it."""
        live = self.live
        if live.current is None:
            return
        if self._stop is None or self.waits:
            self.miss("", CUT)
        around = on_stack(live.frame)  # our model goes on, or its post hook is to come
        self.abandon()
        live.idle = around
        if not self._misses.warned:
            self._misses.warn_in_forward()

    def _restart(self) -> None:
        """The model has other modules than it had: learn it anew."""
        self.names.refresh()
        self.paths.refresh()
        self._units.clear()
        self._placing.only_on_model()
        self.compiled.refresh()
        if self._stop is not None:
            self._stop.forget()
        self.watch = Watch(self.model, self.hooks)
        self._open_always()
        self.unseen.scripted(bool(self.compiled))
