"""Tap: read a later call of a proven module with one hook per site.

Taps note what they see in the log of the `Run` that is under way. Whether the log follows the plan
is checked as a whole, when something depends on it and when the run ends; tags are made when
somebody reads them.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from itertools import islice
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from fmapkit._flow import NOWHERE, Flow, Origin, Weight, tensors_in
from fmapkit._functions import describe, out_of_place
from fmapkit._hooks import Hook, leave_mode, nothing, traced_as_nothing
from fmapkit._plan import Plan, Ref, Step
from fmapkit._store import Entry, Held, version_of
from fmapkit._trace import leaves
from fmapkit._wants import Wants

__all__ = ["LightMode", "Line", "OutputTap", "Run", "Tap"]

_module = itemgetter(0)


class Line(threading.local):
    """Where taps write to: the run that is under way in this thread.

    Per thread, so that a tap that fires in another one, which is not captured, finds nothing.

    Attributes:
        cell: the `append` of the run's log, and how tensors are to be read: 0 as they are, 1
            outside the graph, 2 with inference tensors among them. None while no run is under way.
    """

    cell: tuple[Callable[[Any], None], int] | None = None


class Tap(Hook):
    """The hook of a site: notes z, a and their versions, and leaves all else for later.

    Args:
        line: to write to.
        other: called with the hook's arguments when no run is under way.
        fault: called with the module and the error, should we fail.
        owner: the session.
    """

    __slots__ = ("fault", "line")

    def __init__(self, line: Line, other: Any, fault: Any, owner: object) -> None:
        super().__init__(other, owner)
        self.line = line
        self.fault = fault

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        cell = self.line.cell
        if cell is None:
            self.call(module, args, output)
            return
        note, how = cell
        try:
            x = args[0]
            if how:
                if how == 2:
                    note((module, output, version_of(output), x, version_of(x)))
                    return
                if x.requires_grad:
                    x = x.detach()
                if output.requires_grad:
                    output = output.detach()
            note((module, output, output._version, x, x._version))
        except Exception as error:  # ours, not the user's: named in `missed`, never raised
            self.fault(module, error)

    traced_as_nothing(__call__)

    def disarm(self) -> None:
        """Let go of the session and its run."""
        super().disarm()
        self.line = Line()
        self.fault = nothing


class OutputTap(Tap):
    """The same for a site of which only what the module returns is held."""

    __slots__ = ()

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        cell = self.line.cell
        if cell is None:
            self.call(module, args, output)
            return
        note, how = cell
        try:
            if how and output.requires_grad:
                output = output.detach()
            note((module, output, version_of(output) if how == 2 else output._version))
        except Exception as error:  # ours, not the user's: named in `missed`, never raised
            self.fault(module, error)

    traced_as_nothing(__call__)


class Run:
    """One call of a proven module, read by its plan."""

    __slots__ = (
        *("_checked", "_origins", "base", "before", "how", "inputs", "line", "log", "lost"),
        *("marks", "mode", "module", "plan", "wants"),
    )

    def __init__(
        self,
        module: nn.Module,
        plan: Plan,
        wants: Wants,
        line: Line,
        inputs: list[Any],
        base: Counter[str] | None,
    ) -> None:
        self.module = module
        self.plan = plan
        self.wants = wants
        self.line = line
        self.inputs = inputs
        self.base = base
        self.log: list[Any] = []  # per step: its module, then what was read
        self.lost = ""  # why the run left its plan, if it did
        self.before: dict[nn.Module, list[Tensor]] = {}
        self.mode: LightMode | None = None
        self.marks: list[bool] = []  # per running child: whether the mode was on around it
        self.how = int(wants.detach and (plan.graph or torch.is_grad_enabled()))
        if torch.is_inference_mode_enabled():
            self.how = 2
        self._checked = 0  # how many entries of the log are known to follow the plan
        self._origins: dict[Ref, Origin] = {}

    # -- while the model runs -----------------------------------------------------------------

    def start(self) -> None:
        """In-place nonlinearities run out of place from here to `finish`."""
        for module in self.plan.flips:
            module.__dict__["inplace"] = False
        if self.module in self.plan.scopes:
            self.light().resume()
        self.line.cell = (self.log.append, self.how)

    def finish(self) -> None:
        """Put back what `start` changed."""
        self.line.cell = None
        for module in self.plan.flips:
            module.__dict__["inplace"] = True
        if self.mode is not None:
            self.mode.leave()
        self.before.clear()
        self.follows()

    def light(self) -> LightMode:
        """The mode for modules that call a nonlinearity themselves."""
        if self.mode is None:
            self.mode = LightMode(self)
        return self.mode

    def follows(self) -> bool:
        """Whether every tap so far fired in the plan's order; if not, the run has strayed."""
        log, order = self.log, self.plan.order
        if self.lost:
            return False
        count = len(log)
        if list(map(_module, log[self._checked :])) == order[self._checked : count]:
            self._checked = count
            return True
        at = self._checked
        while at < len(order) and log[at][0] is order[at]:
            at += 1
        module = log[at][0]
        self.stray(type(module).__name__ if module is not None else "a function")
        del log[at:]
        return False

    def tap(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """A tapped module has run, and more is to be done than a `Tap` does."""
        if not self.follows():
            return
        step = self._next()
        if step is None or step.module is not module:
            self.stray(type(module).__name__)
            return
        x = None
        if module in self.before and any(e.before for e in step.emissions):
            x = self.before[module].pop()
        elif step.emissions:
            x = args[0] if step.key is None and args else (kwargs or {}).get(step.key)
        if step.plain:
            record: tuple[Any, ...] = (module, self._own(output), version_of(output))
            if step.plain == "xy" and x is not None:
                record = (*record, self._own(x), version_of(x))
            self.log.append(record)
        else:
            self.log.append((module, self._read(step, x, output)))

    def _next(self) -> Step | None:
        at, steps = len(self.log), self.plan.steps
        return steps[at] if at < len(steps) else None

    def pre(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A module that overwrites its own input is about to run."""
        step = next((s for s in self.plan.steps[len(self.log) :] if s.module is module), None)
        if step is None or not any(e.before for e in step.emissions):
            return
        x = args[0] if step.key is None and args else (kwargs or {}).get(step.key)
        if isinstance(x, Tensor):
            self.before.setdefault(module, []).append(self._own(x).clone())

    def call(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """A nonlinearity or layer called by a scope itself."""
        step = self._next() if self.follows() else None
        if step is None or step.module is not None or step.function != name:
            self.stray(name)
            return func(*args, **kwargs)
        x = next(islice(tensors_in((args, list(kwargs.values()))), step.place, None), None)
        held = x
        if step.flip:
            other = out_of_place(func, args, kwargs)
            func, args, kwargs = other if other is not None else (func, args, kwargs)
        elif x is not None and any(e.before for e in step.emissions):
            held = self._own(x).clone()
        out = func(*args, **kwargs)
        self.log.append((None, self._read(step, held, out)))
        return out

    def _read(self, step: Step, x: Any, output: Any) -> list[Any]:
        read: list[Any] = []
        pieces = dict(leaves(output)) if any(e.kind == "output" for e in step.emissions) else {}
        shared: dict[tuple[str, bool], Tensor] = {}
        for emission in step.emissions:
            if emission.kind == "output":
                value = pieces.get(emission.path)
            else:
                value = x if emission.slot == "x" else output
            if not isinstance(value, Tensor):
                read.append(None)
                continue
            slot = (emission.slot, emission.picked is not None)
            if slot in shared:
                value = shared[slot]
            elif emission.picked is not None and emission.axes is not None:
                value = self.wants.take(value, emission.axes, emission.picked)
            else:
                value = self._own(value)
                if emission.copy and not emission.before:
                    value = value.clone()
            shared[slot] = value
            read.append((value, version_of(value)))
        return read

    def _own(self, tensor: Tensor) -> Tensor:
        """Outside the graph, unless asked otherwise."""
        return tensor.detach() if self.wants.detach and tensor.requires_grad else tensor

    def stray(self, what: str) -> None:
        """The run does not follow its plan: what is held so far stays, the rest is not labelled."""
        if not self.lost:
            self.lost = what
            self.line.cell = None

    # -- when it is read ----------------------------------------------------------------------

    def origin(self, ref: Ref) -> Origin:
        """The origin of this run that a plan speaks of."""
        if ref.kind == "input":
            tag = self.inputs[ref.offset] if self.inputs else None
            return tag.origin if isinstance(tag, Flow) else NOWHERE
        found = self._origins.get(ref)
        if found is None:
            key = f"{ref.name}()" if ref.kind == "output" else ref.name
            base = self.base[key] if self.base is not None else 0
            found = self._origins[ref] = Origin(ref.kind, ref.name, base + ref.offset)
            found.claimed = ref.claimed
        return found

    def output_tags(self) -> list[Any]:
        """What the tensors of the output carry."""
        tags: list[Any] = []
        for item in self.plan.outputs:
            if isinstance(item, tuple):
                ref, axes = item
                tags.append(Flow(self.origin(ref) if ref is not None else NOWHERE, axes))
            else:
                tags.append(item)
        return tags

    def entries(self) -> list[Entry]:
        """The maps of this run, in execution order."""
        found: list[Entry] = []
        for record, step in zip(self.log, self.plan.steps, strict=False):
            if step.plain:
                slots = {"y": (self._own(record[1]), record[2])}
                if step.plain == "xy":
                    slots["x"] = (self._own(record[3]), record[4])
                items = [slots[e.slot] for e in step.emissions]
            else:
                items = record[1]
            shared: dict[int, Held] = {}
            for item, emission in zip(items, step.emissions, strict=True):
                if item is None:
                    continue
                tensor, version = item
                held = shared.get(id(tensor))
                if held is None:
                    copied = emission.copy or emission.picked is not None
                    held = shared[id(tensor)] = Held(tensor, version, copied)
                found.append(
                    Entry(
                        emission.kind,
                        self.origin(emission.ref),
                        held,
                        emission.axes,
                        emission.sigma,
                        emission.path,
                        emission.picked,
                    )
                )
        return found

    def release(self) -> None:
        """Let go of every tensor."""
        self.log.clear()


class LightMode(TorchFunctionMode):
    """Sees the nonlinearities that a proven scope calls itself, and lets the rest pass."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run
        self.names = {s.function for s in run.plan.steps if s.module is None}
        self.on = False
        self._pushed = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = describe(func)
        if self.on and known.name in self.names and torch._C._current_graph_task_id() == -1:
            return self.run.call(known.name, func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def resume(self) -> None:
        """From here on it sees what runs."""
        self.on = True
        if not self._pushed:
            self._pushed = True
            self.__enter__()  # type: ignore[no-untyped-call]

    def pause(self) -> bool:
        """From here on it sees nothing; whether it did.

        It leaves torch's stack, where it costs time, unless another mode lies on top of it: that
        one expects to be taken off first.
        """
        was, self.on = self.on, False
        if self._pushed and _get_current_function_mode() is self:  # type: ignore[no-untyped-call]
            self._pushed = False
            self.__exit__(None, None, None)
        return was

    def leave(self) -> None:
        """Leave the stack for good."""
        self.on = False
        if self._pushed:
            self._pushed = False
            leave_mode(self)


def tag_outputs(output: Any, tags: list[Any], set_tag: Any) -> None:
    """Put a run's tags on the tensors it returned."""
    for (_, tensor), tag in zip(leaves(output), tags, strict=False):
        if isinstance(tag, (Flow, Weight)):
            set_tag(tensor, tag)
