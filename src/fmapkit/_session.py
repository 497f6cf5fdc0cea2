"""One capture at work: from the model's forward to the store.

A pass begins with the model's pre hook and ends with its post hook. In between, each module is

- a *unit*: the outermost proven module on its branch. Its first call of a kind is learned by the
  tracer; later ones are replayed by a `Run`, with one tap per site;
- a *scope*: an unproven module. The tracer watches its own forward in every pass, and leaves the
  units in it alone;
- inside a unit, where only taps are set.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.overrides import _get_current_function_mode

from fmapkit._analyses import Analyses
from fmapkit._aside import operators_are_counted
from fmapkit._budget import Budget
from fmapkit._compiled import Compiled
from fmapkit._doors import doors
from fmapkit._edit import Edits
from fmapkit._ending import Ending
from fmapkit._events import Event
from fmapkit._form import casts, form_of, weights_of
from fmapkit._frames import Frame
from fmapkit._fused import REASON, fused_output, has_fused_path, may_fuse
from fmapkit._gradient_taps import GradientOutputTap, GradientTap
from fmapkit._gradients import NO_GRAPH, OF_VIEW, in_function
from fmapkit._guards import Guard
from fmapkit._hooks import Hook, Hooks, leave_mode, without_modes
from fmapkit._names import Names
from fmapkit._nested import leaves, tensors_in
from fmapkit._origin import Flow, Weight
from fmapkit._plan import Plan, make_plan
from fmapkit._proof import Proofs
from fmapkit._replay import LightMode, Run, tag_outputs
from fmapkit._settle import has_inference_tensors, settle
from fmapkit._sharded import is_wrapped, moves_data
from fmapkit._stop import Stop, StopForward
from fmapkit._store import Entry, Pass, Store, storage_of
from fmapkit._taps import InputTap, Line, OutputTap, Tap
from fmapkit._trace import Tracer
from fmapkit._transforms import TRANSFORMED, transformed
from fmapkit._wants import Wants
from fmapkit._watch import Watch
from fmapkit._wrappers import REPLICAS
from fmapkit.errors import BudgetError, CaptureWarning

__all__ = ["Missed", "Session"]


_RECORDED = (
    "it was recorded into a CUDA graph: nothing has run yet, and replays of the graph run without "
    "Python"
)


_MODES = (Tracer, LightMode)


@dataclass(frozen=True, slots=True)
class Missed:
    """Something that ran and was not captured.

    Attributes:
        layer: the module it ran in, by name.
        reason: why it could not be captured.
    """

    layer: str
    reason: str


class _Unit:
    """A proven module at the top of its branch: what its road depends on, and its plans."""

    __slots__ = ("_flags", "_guards", "_latest", "_places", "_slow", "_values", "form", "plans")

    def __init__(self, module: nn.Module, guards: list[Guard]) -> None:
        self.plans: dict[Any, Plan] = {}
        self.form = weights_of(module)
        self._guards = guards
        self._flags = [m.__dict__ for m in module.modules() if "inplace" in m.__dict__]
        # What a dict holds is compared by identity, all at once; the rest one by one.
        places = [g.place() for g in guards]
        self._places = [p for p in places if p is not None] + [(d, "inplace") for d in self._flags]
        self._slow = [g for g, p in zip(guards, places, strict=True) if p is None]
        self._values: list[Any] = []
        self._latest: tuple[Plan, Any, list[Any]] | None = None

    def state(self) -> Any:
        """The values its road depends on."""
        return tuple([g.value() for g in self._guards]), tuple([d["inplace"] for d in self._flags])

    def same(self, shape: Any) -> Plan | None:
        """The plan of the latest call, if this one is alike in all that the road depends on."""
        if self._latest is None:
            return None
        plan, last, slow = self._latest
        if shape != last or not all(map(is_, self._values, map(_get, self._places))):
            return None
        return plan if [g.value() for g in self._slow] == slow else None

    def remember(self, plan: Plan, shape: Any) -> None:
        """This call's plan, for `same`."""
        self._values = list(map(_get, self._places))
        # A list that took the place of a plain value may change and still be the same object.
        if any(isinstance(v, (list, dict, set)) for v in self._values):
            self._latest = None
        else:
            self._latest = (plan, shape, [g.value() for g in self._slow])


class Session:
    """The life of one `with capture(model)` block."""

    def __init__(
        self,
        model: nn.Module,
        names: Names,
        wants: Wants,
        edits: Edits,
        keep: int | None,
        every: int,
        stop: bool = False,
        given: nn.Module | None = None,
        analyses: Analyses | None = None,
        budget: Budget | None = None,
    ) -> None:
        self.model = model
        self.compiled = Compiled(self, model if given is None else given)
        self.names = names
        self.wants = wants
        self.edits = edits
        self.stop = Stop() if stop else None
        self._forward = StopForward(model, self.stop) if self.stop is not None else None
        self.every = every
        self.store = Store(keep)
        self.analyses = analyses or Analyses(())
        self._budget = budget
        self.hooks = Hooks(self)
        self.missed: list[Missed] = []
        self.thread = threading.get_ident()
        self._warned = False
        self._steps = 0
        self._current: Pass | None = None
        self._idle = False
        self._frame: Any = None  # the stack frame of the running pass
        self._depth = 0  # the model calling itself
        self._tracer: Tracer | None = None
        self._tracing = False  # the tracer is on torch's stack of modes
        self._run: Run | None = None
        self._fused_in: nn.Module | None = None  # running unfused beside its fused path
        self._fused: Any = None
        self._learning: tuple[nn.Module, Frame, Any, list[Any]] | None = None
        self._watch = Watch(model, self.hooks)  # since `names` were read
        self._line = Line()
        self._taps = {"xy": Tap, "y": OutputTap}
        if wants.gradients:
            self._taps = {"xy": GradientTap, "y": GradientOutputTap}
        self._units: dict[nn.Module, _Unit] = {}
        self._proofs = Proofs(self.hooks.is_ours)
        self._tapped: dict[nn.Module, Plan] = {}  # the plan that each unit's taps are set for
        self._direct: set[nn.Module] = set()  # modules that a scope has called itself
        self._opened: set[nn.Module] = set()  # proven, but with something to edit in them
        self._all_hooked = False
        self._early = False  # hooks on all modules, before the first pass
        self._given: list[tuple[nn.Module, Any]] = []  # what hooks that move data were given

    # -- life cycle ---------------------------------------------------------------------------

    def open(self) -> None:
        """Set the one hook pair that every pass goes through.

        Until the first pass, there are hooks on all modules, to name what is called outside of one.
        """
        self.thread = threading.get_ident()
        self._name_scripted()
        self.hooks.around([self.model], self._pre, self._post)
        if self._forward is not None:
            self._forward.install()
        self.compiled.open()
        if not self.compiled:  # dynamo compares hooks, and what stands before a call
            self.hooks.around(_unfused(self.model), self._pre, self._post)
            self._early = True
            Ending.install(self.model, self._interrupted)

    def close(self, failed: bool = False) -> None:
        """Remove everything, however the block ended; a warning never replaces its exception."""
        self._abandon()
        self.compiled.close()
        self.hooks.drop()
        Ending.remove(self.model, self._interrupted)
        if self._forward is not None:
            self._forward.remove()
        self._units.clear()
        self.wants.retention.close()
        self.analyses.view = None
        if not failed:
            self._warn()

    def miss(self, layer: str, reason: str) -> None:
        """Name something that was not captured; each once."""
        entry = Missed(layer, reason)
        if entry not in self.missed:
            self.missed.append(entry)
            self._warned = False

    def _warn(self) -> None:
        if self._warned or not self.missed:
            return
        self._warned = True
        first = self.missed[0]
        more = f" (and {len(self.missed) - 1} more)" if len(self.missed) > 1 else ""
        warnings.warn(
            f"not captured: {first.layer or type(self.model).__name__}: {first.reason}{more}; "
            "see maps.missed",
            CaptureWarning,
            stacklevel=2,
        )

    # -- hooks --------------------------------------------------------------------------------

    def _pre(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self.thread or torch._C._current_graph_task_id() != -1:
            if "_is_replica" in module.__dict__:
                self.miss("", REPLICAS)
            return None
        try:
            if module is self.model and not self._running():
                if not self._begin(args, kwargs):
                    return None
            elif module is self.model:
                self._depth += 1
            if self._current is None:
                if not self._idle:
                    self._stray(module)
                return None
            if self._run is not None:
                self._pre_in_run(module, args, kwargs)
            elif self._learning is None and self._stands_alone(module, args):
                self._direct.add(module)
                return self._enter_unit(module, args, kwargs)
            elif self._tracer is not None:
                if may_fuse(module, _MODES) and not self._fused_in and not self.edits:
                    self._run_fused(module, args, kwargs)
                self._moved(module, (args, kwargs))
                frame = self._tracer.enter(module, args, kwargs)
                self._trace_on()
                return frame.replaced
        except Exception as error:  # ours, not the user's: named in `missed`, never raised
            self._fault(module, error)
        return None

    def _post(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if threading.get_ident() != self.thread or torch._C._current_graph_task_id() != -1:
            return None
        replaced = None
        failed = output is None and sys.exc_info()[0] is not None
        try:
            if self._current is None:
                if module is self.model:
                    self._idle = False
                return None
            if self._run is not None and self._run.module is module:
                self._leave_run(args, kwargs, output)
            elif self._run is not None:
                self._post_in_run(module, args, kwargs, output, failed)
            elif self._learning is not None and self._learning[0] is module:
                replaced = self._learned(module, output, failed)
            elif self._tracer is not None:
                self._moved(module, output)
                replaced = self._tracer.leave(module, None if failed else output)
                if module is self._fused_in:
                    replaced = self._take_fused(output)
            if module is self.model:
                if self._depth:
                    self._depth -= 1
                else:
                    self._end(failed)
            elif self.stop is not None and self._run is None and self._learning is None:
                self.stop.check()
        except Exception as error:
            if module is self.model and not self._depth:
                self._abandon()
            self._fault(module, error)
        return replaced

    def _before_moving(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Hooks that only redistribute come next: note what they are given (see `_sharded.py`)."""
        if self._tracer is not None and threading.get_ident() == self.thread:
            self._given.append((module, (args, kwargs)))

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        """The same for hooks on what the module returns."""
        if self._tracer is not None and threading.get_ident() == self.thread:
            self._given.append((module, output))

    def _moved(self, module: nn.Module, values: Any) -> None:
        """What such hooks made of it carries what it carried."""
        if self._given:
            owner, given = self._given.pop()
            if owner is module and self._tracer is not None:
                self._tracer.moved(given, values)

    def _tap(self, module: nn.Module, args: Any, output: Any) -> None:
        run = self._run
        if run is None or threading.get_ident() != self.thread:
            if threading.get_ident() == self.thread and self._current is None and not self._idle:
                self._stray(module)
            return
        if torch._C._current_graph_task_id() != -1:
            return
        if module not in run.plan.taps:
            return
        try:
            run.tap(module, args, None, output)
        except Exception as error:
            self._fault(module, error)

    def _tap_before(self, module: nn.Module, args: Any) -> None:
        run = self._run
        if run is None or threading.get_ident() != self.thread:
            return
        if torch._C._current_graph_task_id() != -1 or module not in run.plan.inputs:
            return
        try:
            run.before_call(module, args)
        except Exception as error:
            self._fault(module, error)

    def _fault(self, module: nn.Module, error: Exception) -> None:
        if error in (self.edits.raised, self.analyses.raised) or isinstance(error, BudgetError):
            self.edits.raised = self.analyses.raised = None  # whose traceback holds tensors
            raise error  # the user's own function, or what the user has asked for
        self.miss(self.names.of(module), f"fmapkit failed here: {type(error).__name__}: {error}")
        if self._run is not None:
            self._run.stray(type(error).__name__)

    def _stray(self, module: nn.Module) -> None:
        """A module runs outside of a pass: name the outermost one that is running."""
        if torch._C._current_graph_task_id() != -1:
            return
        at = sys._getframe(1)
        while at is not None:
            if at.f_code is nn.Module._call_impl.__code__:
                running = at.f_locals["self"]
                module = running if running in self.names.by_module else module
            at = at.f_back  # type: ignore[assignment]
        if isinstance(module, ParametrizationList):  # somebody has read a weight
            return
        if module is self.model:  # a pass of its own that is not captured, and says why
            return
        name = self.names.of(module)
        hint = f": capture(model.{name})" if name else ""
        self.miss(
            name,
            f"it was called outside {type(self.model).__name__}.forward, "
            "and only what runs inside a forward pass of the captured model is captured; "
            f"for its own passes, capture that module{hint}",
        )

    # -- a pass -------------------------------------------------------------------------------

    def _running(self) -> bool:
        """Whether a pass is under way; one that ended without its post hook is cleared away."""
        if self._frame is None:
            return False
        at = sys._getframe(1)
        while at is not None:
            if at is self._frame:
                return True
            at = at.f_back  # type: ignore[assignment]
        self._abandon()
        return False

    def uncover(self) -> None:
        """The model is being compiled: no hooks inside, and nothing before its own call."""
        Ending.remove(self.model, self._interrupted)
        if not self._steps:
            self.hooks.drop("around", keep=[self.model])

    def _interrupted(self) -> None:
        """A call of the model has ended, and no post hook has run."""
        if threading.get_ident() == self.thread and not self._running():
            self._idle = False

    def _refused(self, args: Any, kwargs: Any, compiled: bool) -> bool:
        """Whether the pass cannot be captured as a whole; if so, it is named."""
        self._idle = False
        if not compiled and self.compiled.unannounced():
            self.compiled.noticed()
        elif _transformed(self.model, (args, kwargs)):
            self.miss("", TRANSFORMED)
        elif _recording():
            self.miss("", _RECORDED)
        else:
            return False
        return True

    def _begin(self, args: Any, kwargs: Any, compiled: bool = False) -> bool:
        step = self._steps
        self._steps += 1
        self._idle = bool(step % self.every) or self._refused(args, kwargs, compiled)
        if self._idle:
            self._drop_hooks()
            return False
        self._frame = _call_frame()  # on Python's stack as long as the pass runs
        if self._watch.changed():
            self._restart()
        self._current = self.store.begin(step, self.model.training)
        self.edits.begin()
        self.wants.retention.begin()
        if self.stop is not None:
            self.stop.begin()
        if compiled:
            self._drop_hooks()
            self._new_tracer().enter_inputs(args, kwargs)
        elif not self._is_unit(self.model):
            self._watch_scopes()
            self._new_tracer().enter_inputs(args, kwargs)
            self._trace_on()
        return True

    def _end(self, failed: bool) -> None:
        tracer, current = self._tracer, self._current
        self._trace_out()
        if tracer is not None:
            for event in tracer.events:
                for held in (event.x_held, event.y_held):
                    if held is not None:
                        held.check()
            for module in tracer.unhooked:
                self.miss(
                    self.names.of(module),
                    "it was called on its own, so far only as a part of another module: in "
                    "this pass it was seen by the functions it called, later on as a module",
                )
                self._direct.update(self.model.modules())
                self._all_hooked = False
            tracer.end()
        stopped = self.stop is not None and self.stop.ended
        for layer, why in self.edits.unapplied() if not failed and not stopped else ():
            self.miss(layer, why)
        if current is not None and self.stop is not None and not failed:
            self.stop.learn(current)
        if current is not None:
            current.closed = True
        self._given.clear()
        self._tracer = self._current = self._frame = self._run = self._learning = None
        self._depth = 0
        del tracer  # which holds tensors, too
        if current is not None and self.wants.gradients:
            for entry in current.entries():
                gradient = entry.held.gradient if entry.held is not None else None
                if gradient is not None and gradient.spoiled:
                    self.miss(entry.origin.name, OF_VIEW)
        if current is not None:
            with without_modes():  # another capture's tracer may be on
                self._keep(current, failed)
        if self.missed and not self._warned:
            try:
                self._warn()
            except CaptureWarning:  # warnings are errors: raise when the block ends, not in forward
                self._warned = False

    def _keep(self, current: Pass, failed: bool) -> None:
        """The pass has ended: what becomes of its maps."""
        if self.wants.retention:
            for held in current.held():
                self.wants.put_away(held)
        self.wants.retention.end()
        if self.analyses and not failed:
            runs = [s for s in current.segments if isinstance(s, Run) and s.analyses is not None]
            for run in runs:  # of which they have seen most, or all
                self._show(current, run.fresh(self.store.fleeting))
            if not runs:
                self._show(current, current.entries())
        if self.store.fleeting:
            current.release()
            self.wants.retention.buffers.drop()
        elif has_inference_tensors(current):
            settle(current)
        if self._budget is not None and not failed:
            self._budget.check(self.store)

    def _show(self, current: Pass, entries: Iterable[Entry]) -> None:
        """Have the analyses see some maps; should they call the model, we look away."""
        thread, self.thread = self.thread, 0
        try:
            for layer, why in self.analyses.see(current, entries):
                self.miss(layer, why)
        finally:
            self.thread = thread

    def _stream(self, run: Run) -> None:
        """The same, while the model runs: with keep=0, a map lives no longer than that."""
        assert self._current is not None
        self._show(self._current, run.fresh(self.store.fleeting))

    def _abandon(self) -> None:
        """The pass ended without its post hook: leave no mode, flag or learning hook behind."""
        if self._run is not None:
            self._run.finish()
            if self._current is not None:  # what was captured so far stays readable
                self._current.segments.append(self._run)
        if self._learning is not None:
            module, self._learning = self._learning[0], None
            self._unlearn(module)
        self._trace_out()
        if self._tracer is not None:
            self._tracer.end()
        self._given.clear()
        current = self._current
        self._tracer = self._current = self._frame = self._run = None
        if current is not None:
            current.closed = True
            with without_modes():
                self._keep(current, failed=True)
        self._fused_in = self._fused = None
        self._depth = 0
        self._idle = False

    def _restart(self) -> None:
        """The model has other modules than it had: learn it anew."""
        self.names.refresh()
        self._units.clear()
        self._proofs = Proofs(self.hooks.is_ours)
        self._drop_hooks()
        self.compiled.refresh()
        self._direct.clear()
        self._opened.clear()
        if self.stop is not None:
            self.stop.forget()
        self._watch = Watch(self.model, self.hooks)
        self._name_scripted()

    def _name_scripted(self) -> None:
        """Scripted modules, and scripted functions that a forward calls by name: all unseen."""
        for module, name in self.names.by_module.items():
            if isinstance(module, torch.jit.ScriptModule):
                outer = self.names.by_name.get(name.rpartition(".")[0]) if "." in name else None
                if not isinstance(outer, torch.jit.ScriptModule):
                    self.miss(name, "it is scripted: torch runs it without Python, unseen by hooks")
            elif not type(module).__module__.startswith("torch.nn.modules."):
                for function in _scripted(module):
                    why = f"it calls {function.name}, which is scripted: unseen by Python"
                    self.miss(name, why)

    # -- modes --------------------------------------------------------------------------------

    def _new_tracer(self) -> Tracer:
        assert self._current is not None
        self.names.update()
        self._tracer = Tracer(
            self.names, self.wants, self.edits, self.stop, self._current, self.miss
        )
        return self._tracer

    def _trace_on(self) -> None:
        if self._tracer is not None:
            self._tracer.paused = False
            if not self._tracing:
                self._tracer.__enter__()  # type: ignore[no-untyped-call]
                self._tracing = True

    def _trace_off(self) -> bool:
        """Pause the tracer; it leaves the stack, unless another mode lies on top of it."""
        if self._tracer is None or self._tracer.paused:
            return False
        self._tracer.paused = True
        top = _get_current_function_mode()  # type: ignore[no-untyped-call]
        if self._tracing and top is self._tracer:
            self._tracer.__exit__(None, None, None)
            self._tracing = False
        return True

    def _trace_out(self) -> None:
        """The tracer leaves the stack for good."""
        if self._tracing and self._tracer is not None:
            leave_mode(self._tracer)
        self._tracing = False

    # -- torch's fused paths ------------------------------------------------------------------

    def _run_fused(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """What the fused path returns, if torch would take it: the output of the captured run."""
        paused = self._trace_off()

        def bare() -> Any:
            with self.hooks.suspended(module.modules()):
                return module.forward(*args, **kwargs)

        fused, output = fused_output(module, args, kwargs, bare)
        if paused:
            self._trace_on()
        if fused:
            self._fused_in, self._fused = module, output
            self.miss(self.names.of(module), REASON)

    def _take_fused(self, output: Any) -> Any:
        fused, self._fused_in, self._fused = self._fused, None, None
        assert self._tracer is not None
        for (_, ours), (_, theirs) in zip(leaves(output), leaves(fused), strict=False):
            self._tracer.set_tag(theirs, self._tracer.tag(ours))
        return fused

    # -- units --------------------------------------------------------------------------------

    def _is_unit(self, module: nn.Module) -> bool:
        return module not in self._opened and self._proofs.proven(module)

    def _stands_alone(self, module: nn.Module, args: Any) -> bool:
        """Whether this call is a unit: not inside a module that may be one σ or layer itself."""
        if not self._is_unit(module) or _transformed(module, args):
            return False
        return self._tracer is None or all(f.kind == "plain" for f in self._tracer.frames)

    def _unit(self, module: nn.Module) -> _Unit:
        found = self._units.get(module)
        if found is None:
            found = self._units[module] = _Unit(module, self._proofs.guards(module))
        return found

    def _watch_scopes(self) -> None:
        """Hooks on every module, but for those inside units that scopes have called as a whole."""
        if self._all_hooked:
            return
        self._all_hooked = True
        inside: set[nn.Module] = set()
        for unit in self._direct:
            inside.update(m for m in unit.modules() if m is not unit)
        wanted = [m for m in self.model.modules() if m not in inside or m in self._direct]
        self.hooks.around(wanted, self._pre, self._post)
        moving = (
            m
            for m in wanted
            if any(map(moves_data, (*m._forward_pre_hooks.values(), *m._forward_hooks.values())))
        )
        self.hooks.outside(moving, self._before_moving, self._after_forward)

    def _enter_unit(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        unit = self._unit(module)
        tracer = self._tracer
        inputs = [tracer.tag(t) for t in tensors_in(*args, kwargs)] if tracer is not None else []
        modes = (torch.is_grad_enabled(), operators_are_counted(), casts(), *unit.form())
        shape = (_shape(args), _shape(kwargs), self._carried(inputs), modes)
        plan = unit.same(shape)
        if plan is None:
            key = (shape, unit.state())
            plan = unit.plans.get(key)
            if plan is None:
                return self._learn(module, key, args, kwargs, inputs)
            unit.remember(plan, shape)
        if self.edits and self._edited_inside(plan, inputs):
            return self._learn(module, None, args, kwargs, inputs)
        if self._tapped.get(module) is not plan:
            self._set_taps(plan, module)
        if tracer is not None and plan.writes:
            written = tensors_in(*args, kwargs)
            for index in plan.writes:
                tracer.aliases.before_write(written[index])
        self._trace_off()
        base = Counter(tracer.counts) if tracer is not None else None
        stop = self.stop if tracer is None else None
        analyses = self._stream if self.analyses and tracer is None else None
        self._run = Run(module, plan, self.wants, self._line, stop, inputs, base, analyses)
        if self.wants.graph and self._current is not None and self._current.grads:
            if in_function():
                self.miss(self.names.of(module), NO_GRAPH)
        if module in plan.before:
            self._run.pre(module, args, kwargs)
        self._run.start()
        return None

    def _edited_inside(self, plan: Plan, inputs: list[Any]) -> bool:
        """Whether filters that an edit is for reach a nonlinearity inside."""
        tags = (inputs[index] for index in plan.claims if index < len(inputs))
        return any(isinstance(t, Flow) and self.edits.of(t.origin.name) for t in tags)

    def _carried(self, inputs: list[Any]) -> Any:
        """What the inputs carry, origins numbered in order of their first mention."""
        if self._tracer is None:
            return None
        origins: list[int] = []
        carried: list[Any] = []
        for tag in inputs:
            if isinstance(tag, Flow):
                if id(tag.origin) not in origins:
                    origins.append(id(tag.origin))
                place = origins.index(id(tag.origin))
                # Which of a layer's maps are held may differ from layer to layer.
                asked = self.wants.of(tag.origin.name)
                carried.append((tag.origin.kind, tag.axes, place, asked))
            else:
                carried.append("weight" if isinstance(tag, Weight) else None)
        return tuple(carried)

    def _learn(self, module: nn.Module, key: Any, args: Any, kwargs: Any, inputs: list[Any]) -> Any:
        self.hooks.drop("after")
        self.hooks.drop("before")
        self._tapped.clear()
        tracer = self._tracer
        if tracer is None:
            tracer = self._new_tracer()
            tracer.enter_inputs(args, kwargs)
        self.hooks.around(module.modules(), self._pre, self._post)
        tracer.trial += 1
        tracer.aliases.written.clear()
        tracer.edited = False
        frame = tracer.enter(module, args, kwargs)
        frame.counts = Counter(tracer.counts)
        frame.storages = {storage_of(t) for t in tensors_in(*args, kwargs)}
        self._learning = (module, frame, key, inputs)
        self._trace_on()
        return frame.replaced

    def _learned(self, module: nn.Module, output: Any, failed: bool) -> Any:
        assert self._learning is not None and self._tracer is not None
        tracer = self._tracer
        _, frame, key, inputs = self._learning
        replaced = tracer.leave(module, None if failed else output)
        tracer.trial -= 1
        self._learning = None
        self._unlearn(module)
        if tracer.edited:  # from the next pass on, only the parts below that need it are traced
            self._opened.add(module)
            self._direct.discard(module)
            self._all_hooked = False
        elif not failed and tracer.failed is None:
            for event in tracer.events[frame.start :]:
                for held in (event.x_held, event.y_held):
                    if held is not None:
                        held.check()
            final = output if replaced is None else replaced
            arguments = tensors_in(*frame.args, frame.kwargs)
            plan = make_plan(tracer, frame, final, inputs, arguments)
            if not any(map(_sharded, tracer.events[frame.start :])):
                self._unit(module).plans[key] = plan
                self._set_taps(plan, module)
            tracer.let_go(tracer.events[frame.start :])
        return replaced

    def _unlearn(self, unit: nn.Module) -> None:
        """Inside the unit, no hooks but taps from here on."""
        self.hooks.drop("around", only=[m for m in unit.modules() if m not in self._direct])

    def _set_taps(self, plan: Plan, module: nn.Module) -> None:
        around = plan.toggles | plan.scopes | plan.before | self._keyed(plan)
        self.hooks.around(around - {module}, self._pre, self._post)
        last = plan.order[-1] if plan.order and self.stop is not None else None
        replaced = False
        for tapped in plan.taps - {module}:
            how = plan.direct.get(tapped) if tapped is not last and not self.analyses else None
            if how is None:
                replaced |= self.hooks.after(tapped, Hook(self._tap, self))
            else:
                kind = self._taps[how]
                tap = kind(self._line, self._tap, self._fault, self)
                replaced |= self.hooks.after(tapped, tap)
        for noted, key in plan.inputs.items():
            if key is last or self.analyses:
                replaced |= self.hooks.before(noted, Hook(self._tap_before, self))
            else:
                noting = InputTap(key, self._line, self._tap_before, self._fault, self)
                replaced |= self.hooks.before(noted, noting)
        if replaced:  # other plans, of this unit or of one that shares a module, set theirs again
            self._tapped.clear()
        for door in doors(module, self.hooks.modules()):
            self.hooks.after(door, Hook(self._tap, self))
        self._tapped[module] = plan

    def _keyed(self, plan: Plan) -> frozenset[nn.Module]:
        """Taps whose input comes by keyword need the costlier hook."""
        return frozenset(s.module for s in plan.steps if s.key is not None and s.module is not None)

    def _drop_hooks(self) -> None:
        """All but those that every pass goes through."""
        if self._tapped or self._all_hooked or self._early:
            self._early = False
            self.hooks.drop("after")
            self.hooks.drop("outside")
            self.hooks.drop("before")
            self.hooks.drop("around", keep=[self.model])
            self._tapped.clear()
            self._all_hooked = False

    def _pre_in_run(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        run = self._run
        assert run is not None
        plan = run.plan
        if module in plan.before:
            run.pre(module, args, kwargs)
        if module in plan.inputs:
            run.before_call(module, args)
        if plan.scopes:
            if module in plan.toggles:
                run.marks.append(run.light().pause())
            if module in plan.scopes:
                run.light().resume()

    def _post_in_run(
        self, module: nn.Module, args: Any, kwargs: Any, output: Any, failed: bool
    ) -> None:
        run = self._run
        assert run is not None
        plan = run.plan
        if plan.scopes:
            if module in plan.scopes:
                run.light().pause()
            if module in plan.toggles:
                if run.marks and run.marks.pop():
                    run.light().resume()
        if not failed and module in plan.taps:
            run.tap(module, args, kwargs, output)

    def _leave_run(self, args: Any, kwargs: Any, output: Any) -> None:
        run = self._run
        assert run is not None and self._current is not None
        self._run = None
        failed = output is None and sys.exc_info()[0] is not None
        if run.module in run.plan.taps and not failed:
            run.tap(run.module, args, kwargs, output)
        run.finish()
        if not failed and not run.lost and len(run.log) != len(run.plan.order):
            run.lost = "fewer taps fired than were learned"
        if run.lost:
            self._units.pop(run.module, None)
            self.miss(
                self.names.of(run.module),
                f"its pass left the road it was proven to take ({run.lost}); learned anew",
            )
        tracer = self._tracer
        if tracer is None:
            self._current.segments.append(run)
            return
        for entry, emission in zip(
            run.entries(), (e for s in run.plan.steps for e in s.emissions), strict=False
        ):
            self._current.segments.append(entry)
            if self.stop is not None:
                self.stop.saw(entry)
            if entry.held is not None:
                tracer.aliases.watch(entry.held)
            if emission.pending:
                tracer.pending.setdefault(id(entry.origin), []).append(entry)
        for name, count in run.plan.calls:
            tracer.counts[name] += count
        self.wants.retention.fence()
        for index in run.plan.claims:
            tag = run.inputs[index]
            if isinstance(tag, Flow):
                tracer.claim(tag.origin)
        tag_outputs(output, run.output_tags(), tracer.set_tag)
        self._trace_on()


def _recording() -> bool:
    """Whether a CUDA graph is being recorded."""
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return bool(started and torch.cuda.is_current_stream_capturing())


def _unfused(module: nn.Module) -> Iterator[nn.Module]:
    """All modules but those whose fused path a hook would bar."""
    if not has_fused_path(module):
        yield module
        for child in module.children():
            yield from _unfused(child)


def _get(place: tuple[dict[str, Any], str]) -> Any:
    return place[0].get(place[1])


def _sharded(event: Event) -> bool:
    """Whether a map of it is a wrapper, of whose writes a tap would see one half."""
    return any(e.held is not None and is_wrapped(e.held.tensor) for _, e in event.entries)


def _transformed(module: nn.Module, value: Any) -> bool:
    """Whether a torch.func transform is at work on a call: on what it is given, or its weights."""
    if torch._C._functorch.peek_interpreter_stack() is None:
        return False
    with torch._C.DisableTorchFunction():
        # Under `grad` and its like, whatever runs gives a tensor of the transform.
        if transformed(torch.empty(()).detach()):
            return True
        own = (*module.parameters(), *module.buffers())
        return any(transformed(t) for t in (*tensors_in(value), *own))


def _scripted(module: nn.Module) -> list[torch.jit.ScriptFunction[Any, Any]]:
    """The scripted functions that a module's forward knows by name, or its attributes hold."""
    forward = getattr(type(module), "forward", None)
    code = getattr(forward, "__code__", None)
    values = list(module.__dict__.values())
    if forward is not None and code is not None:
        values += [forward.__globals__.get(name) for name in code.co_names]
        values += [cell.cell_contents for cell in forward.__closure__ or ()]
    return [value for value in values if isinstance(value, torch.jit.ScriptFunction)]


def _call_frame() -> Any:
    """Python's frame of the running `Module.__call__`."""
    at = sys._getframe(1)
    while at is not None and at.f_code is not nn.Module._call_impl.__code__:
        at = at.f_back  # type: ignore[assignment]
    return at


def _shape(value: Any) -> Any:
    """What kind of arguments these are: form of tensors, types of the rest, by place."""
    if isinstance(value, Tensor):
        form = form_of(value)
        return form if type(value) is Tensor else (form, type(value))
    if isinstance(value, (tuple, list)):
        return tuple([_shape(v) for v in value])
    if isinstance(value, dict):
        return tuple([(k, _shape(v)) for k, v in value.items()])
    return type(value)
