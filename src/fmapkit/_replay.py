"""Tap: read a later call of a proven module with one hook per site.

A `Run` goes through the plan's steps as the taps fire. It holds what each step says, and nothing
else: tags are made when somebody reads them.
"""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from fmapkit._flow import NOWHERE, Flow, Origin, Weight, tensors_in
from fmapkit._functions import describe, out_of_place
from fmapkit._hooks import leave_mode
from fmapkit._plan import Plan, Ref, Step
from fmapkit._store import Entry, Held, version_of
from fmapkit._trace import leaves
from fmapkit._wants import Wants

__all__ = ["LightMode", "Run"]


class Run:
    """One call of a proven module, read by its plan."""

    __slots__ = (
        *("_origins", "base", "before", "index", "inference", "inputs"),
        *("marks", "log", "lost", "mode", "module", "plan", "wants"),
    )

    def __init__(
        self,
        module: nn.Module,
        plan: Plan,
        wants: Wants,
        inputs: list[Any],
        base: Counter[str] | None,
    ) -> None:
        self.module = module
        self.plan = plan
        self.wants = wants
        self.inputs = inputs
        self.base = base
        self.index = 0
        self.log: list[Any] = []
        self.lost = ""  # why the run left its plan, if it did
        self.before: dict[nn.Module, list[Tensor]] = {}
        self.inference = torch.is_inference_mode_enabled()
        self.mode: LightMode | None = None
        self.marks: list[bool] = []  # per running child: whether the mode was on around it
        self._origins: dict[Ref, Origin] = {}

    # -- while the model runs -----------------------------------------------------------------

    def start(self) -> None:
        """In-place nonlinearities run out of place from here to `finish`."""
        for module in self.plan.flips:
            module.__dict__["inplace"] = False
        if self.module in self.plan.scopes:
            self.light().resume()

    def finish(self) -> None:
        """Put back what `start` changed."""
        for module in self.plan.flips:
            module.__dict__["inplace"] = True
        if self.mode is not None:
            self.mode.leave()
        self.before.clear()

    def light(self) -> LightMode:
        """The mode for modules that call a nonlinearity themselves."""
        if self.mode is None:
            self.mode = LightMode(self)
        return self.mode

    def tap(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """A tapped module has run."""
        steps = self.plan.steps
        if self.index >= len(steps) or steps[self.index].module is not module:
            self.stray(type(module).__name__)
            return
        step = steps[self.index]
        self.index += 1
        if step.plain:
            x = args[0]
            if self.wants.detach:
                if x.requires_grad:
                    x = x.detach()
                if output.requires_grad:
                    output = output.detach()
            if self.inference:
                self.log.append((x, output, version_of(x), version_of(output)))
            else:
                self.log.append((x, output, x._version, output._version))
            return
        x = None
        if module in self.before and any(e.before for e in step.emissions):
            x = self.before[module].pop()
        elif step.emissions:
            x = args[0] if step.key is None and args else (kwargs or {}).get(step.key)
        self.log.append(self._read(step, x, output))

    def pre(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A module that overwrites its own input is about to run."""
        step = next((s for s in self.plan.steps[self.index :] if s.module is module), None)
        if step is None or not any(e.before for e in step.emissions):
            return
        x = args[0] if step.key is None and args else (kwargs or {}).get(step.key)
        if isinstance(x, Tensor):
            self.before.setdefault(module, []).append(self._own(x).clone())

    def call(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """A nonlinearity or layer called by a scope itself."""
        steps = self.plan.steps
        step = steps[self.index] if self.index < len(steps) else None
        if step is None or step.module is not None or step.function != name:
            self.stray(name)
            return func(*args, **kwargs)
        self.index += 1
        x = next(islice(tensors_in((args, list(kwargs.values()))), step.place, None), None)
        held = x
        if step.flip:
            other = out_of_place(func, args, kwargs)
            func, args, kwargs = other if other is not None else (func, args, kwargs)
        elif x is not None and any(e.before for e in step.emissions):
            held = self._own(x).clone()
        out = func(*args, **kwargs)
        self.log.append(self._read(step, held, out))
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
        return tensor.detach() if self.wants.detach else tensor

    def stray(self, what: str) -> None:
        """The run does not follow its plan: what is held so far stays, the rest is not labelled."""
        if not self.lost:
            self.lost = what
            self.index = len(self.plan.steps) + 1

    # -- when it is read ----------------------------------------------------------------------

    def origin(self, ref: Ref) -> Origin:
        """The origin of this run that a plan speaks of."""
        if ref.kind == "input":
            tag = self.inputs[ref.offset]
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
                x, y, vx, vy = record
                record = [(x, vx), (y, vy)]
            shared: dict[int, Held] = {}
            for item, emission in zip(record, step.emissions, strict=True):
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
