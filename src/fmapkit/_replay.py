"""Tap: read a later call of a unit with one tap per site.

Taps (see `_taps.py`) note what they see in the log of the `Run` that is under way. Whether the log
follows the plan is checked as a whole, when something depends on it and when the run ends; tags are
made when somebody reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from operator import itemgetter
from threading import get_ident
from types import BuiltinMethodType, FunctionType, MethodDescriptorType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from fmapkit._aside import clone, goes_on_from
from fmapkit._functions import describe, out_of_place
from fmapkit._gradients import Gradient, in_function, watch
from fmapkit._hooks import leave_mode
from fmapkit._in_place import is_alone, someone_sees, with_new_memory
from fmapkit._missed import NotSupportedError
from fmapkit._nested import leaves, tensors_in
from fmapkit._origin import NOWHERE, Flow, Origin, Tag
from fmapkit._plan import Emission, FlowRef, PlaceTag, Plan, Ref, Step
from fmapkit._stop import Stop
from fmapkit._store import Entry, Held, storage_of, version_of
from fmapkit._taps import Line
from fmapkit._wants import Wants
from fmapkit.paths import Expected, taps

__all__ = ["LightMode", "Run", "tag_outputs"]

_Place = TypeVar("_Place", int, str)
_module = itemgetter(0)
_FUNCTIONS = frozenset({FunctionType, BuiltinMethodType, MethodDescriptorType})
_grads: Callable[[], bool] = torch.is_grad_enabled
_inference: Callable[[], bool] = torch.is_inference_mode_enabled

# A tensor, its version, where its gradient will arrive, and whether it is a copy.
Item = tuple[Tensor, int, Gradient | None, bool]
# By slot, and whether some filters were picked.
Slots = dict[tuple[str, bool], Item]


class Run:
    """One call of a unit, read by its plan."""

    __slots__ = (
        *(
            "_checked",
            "_let_go",
            "_origins",
            "_outer",
            "_seen",
            "analyses",
            "base",
            "before",
            "drop",
            "how",
        ),
        *("inputs", "line", "log", "lost", "marks", "mode", "module", "plan", "stop"),
        *("ended", "expected", "uncounted", "until", "wants"),
    )

    def __init__(
        self,
        module: nn.Module,
        plan: Plan,
        wants: Wants,
        line: Line,
        expected: Expected,
        stop: Stop | None,
        inputs: list[Tag],
        base: dict[str, int] | None,
        drop: Callable[[Any], None],
        analyses: Callable[[Run], None] | None = None,
    ) -> None:
        self.module = module
        self.plan = plan
        self.wants = wants
        self.line = line
        self.expected = expected  # the path that it is taken to take
        self.ended = False  # early, by our stop
        self.stop = stop  # what to end the pass by, after the last step
        self.drop = drop  # lets go of an older map
        self.analyses = analyses  # to be shown each map as soon as it is there
        self._seen = 0  # how many steps they were shown
        self._let_go = False  # of what they have seen
        self.inputs = inputs
        self.base = base
        self.log: list[Any] = []  # per step: its module, then what was read
        self.lost = ""  # why the run left its plan, if it did
        self.until: int | None = None  # of a call that has broken off: what was read before is kept
        self.before: dict[nn.Module, list[Slots]] = {}  # read before the call that overwrites it
        self._outer: Callable[[str, Any], Any] | None = (
            None  # what another capture's run has tapped
        )
        self.mode: LightMode | None = None
        self.marks: list[bool] = []  # per running child: whether the mode was on around it
        self.how = int(wants.detach and (plan.graph or _grads()))
        if _inference():
            self.how = 2
        elif wants.detach and (plan.joins or in_function()):
            self.how = 3
        if wants.detach and plan.keeps and _inference():
            self.how = (
                4  # no version would tell that a tensor of the model's was given other memory
            )
        self.uncounted = (
            self.how in (2, 4) or wants.gradients
        )  # some tensor may have no version counter
        self._checked = 0  # how many entries of the log are known to follow the plan
        self._origins: dict[Ref, Origin] = {}

    # -- while the model runs -----------------------------------------------------------------

    def start(self) -> None:
        """From here to `finish`, taps write to this run."""
        plan, wants = self.plan, self.wants
        fresh = False
        if plan.keeps and self.how < 2 and not plan.shares and not plan.scopes:
            fresh = wants.detach and not wants.gradients and not someone_sees()
        if self.module in plan.scopes:
            self.light().resume()
        self.line.run = self
        self.line.cell = self.log.append, self.how, plan.taps, self.drop, fresh
        if self.plan.sites:
            self._outer = taps.get(get_ident())
            taps[get_ident()] = self.at_site

    def at_site(self, site: str, function: Any) -> Any:
        """A function is about to be called where it may be tapped: what to call in its place."""
        outer = self._outer
        if outer is not None:  # of another capture
            function = outer(site, function)
        names = self.plan.sites.get(site)
        if names is None or self.lost or torch._C._current_graph_task_id() != -1:
            return function
        inner = function
        while type(inner) is partial:
            inner = inner.func
        if type(inner) not in _FUNCTIONS or describe(_unbound(inner)).name not in names:
            return function
        return partial(self._called_at_site, site, function)

    def _called_at_site(self, site: str, function: Any, *args: Any, **kwargs: Any) -> Any:
        while type(function) is partial:
            args, kwargs = (*function.args, *args), {**function.keywords, **kwargs}
            function = function.func
        plain = _unbound(function)
        if plain is not function:
            args = (function.__self__, *args)
        return self.call(describe(plain).name, plain, args, kwargs, site)

    def finish(self) -> None:
        """Put back what `start` changed."""
        self._off()
        if self.plan.sites:
            if self._outer is None:
                taps.pop(get_ident(), None)
            else:
                taps[get_ident()] = self._outer
        if self.mode is not None:
            self.mode.leave()
        self.before.clear()
        self.follows()
        for index in self.plan.spare:
            if index < len(self.log):
                self.log[index] = self.log[index][:1]

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
        while at < len(order) and log[at][0] == order[at]:
            at += 1
        module = log[at][0]
        self.stray(type(module).__name__ if module is not None else "a function")
        del log[at:]
        return False

    def tap(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """A tapped module has run, and more is to be done than a `Tap` does."""
        if not self.follows():
            return
        if self._next_key() is not module:
            self.stray(type(module).__name__)
            return
        step = self.plan.at[len(self.log)]
        if step is None:
            return
        x = x_grad = before = None
        if self.before.get(module) and any(e.before for e in step.emissions):
            before = self.before[module].pop()
        elif step.emissions:
            x = args[0] if step.key is None and args else (kwargs or {}).get(step.key)
            x_grad = self._watched(x)
        if step.plain and before is None:
            record: tuple[Any, ...] = (module, self._own(output), self._version(output))
            if step.plain == "xy" and x is not None:
                record = (*record, self._own(x), self._version(x))
            if self.wants.gradients:
                record = (*record, self._watched(output), x_grad)
            self.log.append(record)
        else:
            self.log.append((module, self._read(step, x, output, x_grad, before)))
        self._noted()

    def _noted(self) -> None:
        """One more entry of the log is there."""
        self.drop(None)
        if self.analyses is None and (self.stop is None or not self.complete):
            return
        step = self.plan.at[len(self.log) - 1]
        if step is None or not self.expected.at(step.position):
            return  # what the map is shows when the call has ended
        if self.analyses is not None:
            self.analyses(self)
        if self.stop is not None and self.complete:
            self.ended = True
            try:
                self.stop.end()
            finally:
                self.ended = self.stop.ended

    def _next_key(self) -> Any:
        at, order = len(self.log), self.plan.order
        return order[at] if at < len(order) else ()

    def pre(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A module that overwrites its own input is about to run."""
        later = self.plan.at[len(self.log) :]
        step = next((s for s in later if s is not None and s.module is module), None)
        if step is None or not (step.shared or any(e.before for e in step.emissions)):
            return
        x = args[0] if step.key is None and args else (kwargs or {}).get(step.key)
        if isinstance(x, Tensor):
            self.before.setdefault(module, []).append(self._read_before(step, x))

    def call(self, name: str, func: Any, args: Any, kwargs: Any, site: str | None = None) -> Any:
        """A nonlinearity or layer called by a scope itself, at a site if that is known."""
        step = None
        if self.follows() and self._next_key() == site:
            step = self.plan.at[len(self.log)]
        if step is None or step.function != name:
            self.stray(name)
            return func(*args, **kwargs)
        x = next(iter(tensors_in(*args, kwargs)[step.place :]), None)
        if step.plain and self.how < 2 and not self.wants.gradients:
            out = func(*args, **kwargs)
            self.log.append((site, self._read_plainly(step, x, out)))
            self._noted()
            return out
        x_grad, before = self._watched(x), None
        out = None
        other = out_of_place(func, args, kwargs) if step.keeps else None
        if other is not None and x is not None:
            function, its_args, its_kwargs = other
            z = self.before_in_place(x)
            if z is not None and with_new_memory(x, lambda: function(*its_args, **its_kwargs)):
                out, before = x, self._kept(step, z)
        if out is None:
            if x is not None and (step.shared or any(e.before for e in step.emissions)):
                before = self._read_before(step, x)
            out = func(*args, **kwargs)
        self.log.append((site, self._read(step, x, out, x_grad, before)))
        self._noted()
        return out

    def before_in_place(self, x: Any) -> Tensor | None:
        """An in-place σ is about to overwrite x: what will hold z if x is given new memory.

        Returns:
            None where it may not be; what is held of the memory is to be copied then.
        """
        if not self.wants.detach or self.wants.gradients or not is_alone(x):
            return None
        if self.plan.shares or self.how > 1:
            self._exchange(x, lambda t: t.data)
        z: Tensor = x.data
        return z

    def copied(self, x: Tensor) -> Tensor:
        """A copy of what an in-place σ is about to overwrite; other maps of it are copied, too."""
        if self.plan.shares:
            self._exchange(x, clone)
        return clone(self._own(x))

    def _exchange(self, x: Tensor, make: Callable[[Tensor], Tensor]) -> None:
        """Have the log hold something else of what it has in the memory of x."""
        memory = storage_of(x)

        def exchanged(piece: Any) -> Any:
            found = list(piece)
            for at, t in enumerate(piece):
                if isinstance(t, Tensor) and storage_of(t) == memory:
                    found[at] = make(t)
                    found[at + 1] = version_of(found[at])
            same = all(a is b for a, b in zip(found, piece, strict=True))
            return piece if same else _Exchanged(found)

        for index, record in enumerate(self.log):
            if len(record) > 1 and type(record[1]) is list:
                read = [item if item is None else exchanged(item) for item in record[1]]
                self.log[index] = (record[0], read)
            else:
                self.log[index] = exchanged(record)

    def _kept(self, step: Step, z: Tensor) -> Slots:
        """What is stored of z, whose memory nobody else has any more."""
        found: Slots = {}
        for emission in step.emissions:
            slot = _slot(emission)
            if emission.slot == "x" and slot not in found:
                found[slot] = self._stored(replace(emission, copy=False), z, None)
        return found

    def _read_before(self, step: Step, x: Tensor) -> Slots:
        """What is stored of x, which the call is about to overwrite."""
        if step.shared:
            self._exchange(x, clone)
        grad, found = self._watched(x), {}
        for emission in step.emissions:
            slot = _slot(emission)
            if emission.slot == "x" and slot not in found:
                found[slot] = self._stored(emission, x, grad)
        return found

    def _read(
        self, step: Step, x: Any, output: Any, x_grad: Gradient | None, before: Slots | None
    ) -> list[Item | None]:
        read: list[Item | None] = []
        known = {e.path for e in step.emissions if e.kind == "output"}
        pieces = dict(leaves(output)) if known else {}
        if new := pieces.keys() - known:
            self.stray(f"it returned a tensor at {min(new)}, which was not there before")
        shared = before or {}
        for emission in step.emissions:
            slot = _slot(emission)
            if slot not in shared:
                if emission.kind == "output":
                    value = pieces.get(emission.path)
                else:
                    value = x if emission.slot == "x" else output
                if not isinstance(value, Tensor):
                    read.append(None)
                    continue
                grad = x_grad if emission.slot == "x" else self._watched(value)
                try:
                    shared[slot] = self._stored(emission, value, grad)
                except NotSupportedError:  # which was named in the pass that was learned
                    read.append(None)
                    continue
            read.append(shared[slot])
        return read

    def _read_plainly(self, step: Step, x: Any, output: Any) -> list[Item | None]:
        """The same where nothing but references to x and y is held."""
        slots: dict[str, Item | None] = {"x": None, "y": None}
        for slot, value in ("x", x), ("y", output):
            if isinstance(value, Tensor):
                slots[slot] = self._own(value), self._version(value), None, False
        return [slots[emission.slot] for emission in step.emissions]

    def _stored(self, emission: Emission, value: Tensor, grad: Gradient | None) -> Item:
        """What is stored of a tensor."""
        if emission.copy and grad is not None:
            grad.overwritten()
        doomed = emission.copy
        if emission.place is not None:
            if grad is not None:
                grad = grad.picked(*emission.place)
            stored, copied = self.wants.take_at(value, emission.place, doomed), True
        else:
            stored = self.wants.store(value, doomed) if emission.stored else value
            copied = emission.copy or stored is not value
            if stored is value:
                stored = self._own(value)
                if doomed:
                    stored = clone(stored)
                    if emission.on_the_way:
                        goes_on_from(value, stored)
        return stored, self._version(stored), grad, copied

    def _version(self, tensor: Tensor) -> int:
        version = version_of(tensor)
        self.uncounted = self.uncounted or version < 0
        return version

    def _watched(self, tensor: Any) -> Gradient | None:
        """Where the tensor's gradient will arrive, if that was asked for."""
        if self.wants.gradients and isinstance(tensor, Tensor):
            return watch(tensor)
        return None

    def _own(self, tensor: Tensor) -> Tensor:
        """Outside the graph, unless asked otherwise."""
        joins = tensor.requires_grad or self.how > 2
        return tensor.detach() if self.wants.detach and joins else tensor

    def stray(self, what: str) -> None:
        """The run does not follow its plan: what is held so far stays, the rest is not labelled."""
        if not self.lost:
            self.lost = what
            self._off()

    def _off(self) -> None:
        """No tap writes to this run any more."""
        if self.line.cell is not None and self.line.cell[1] in (2, 4):
            self.uncounted = True
        self.line.cell = self.line.run = None

    @property
    def complete(self) -> bool:
        """Whether every tap has fired."""
        return len(self.log) == len(self.plan.order)

    # -- when it is read ----------------------------------------------------------------------

    def origin(self, ref: Ref) -> Origin:
        """The origin of this run that a plan speaks of."""
        if ref.kind == "input":
            tag = self.inputs[ref.offset] if self.inputs else None
            return tag.origin if isinstance(tag, Flow) else NOWHERE
        found = self._origins.get(ref)
        if found is None:
            key = f"{ref.name}()" if ref.kind == "output" else ref.name
            base = self.base.get(key, 0) if self.base is not None else 0
            found = Origin(ref.kind, ref.name, base + ref.offset, ref.made)
            self._origins[ref] = found
            found.claimed = ref.claimed
        return found

    @property
    def origins(self) -> dict[Ref, Origin]:
        """The origins of its maps and results, by the plan's names for them."""
        return self._origins

    def know(self, origins: dict[Ref, Origin]) -> None:
        """Its origins are these, of an earlier run that was alike."""
        self._origins = origins

    def tags_of(self, places: Iterable[tuple[_Place, PlaceTag]]) -> Iterator[tuple[_Place, Tag]]:
        """What tensors carry after the call, by their path in its output, or as arguments."""
        for place, item in places:
            if isinstance(item, FlowRef):
                origin = self.origin(item.ref) if item.ref is not None else NOWHERE
                yield place, Flow(origin, item.axes)
            else:
                yield place, item.weight(self.inputs) if item is not None else None

    def entries(self) -> list[Entry]:
        """The maps of this run, in execution order."""
        return [entry for entry, _ in self.emitted()]

    def emitted(self) -> list[tuple[Entry, Emission]]:
        """The same, each with what the plan says of it."""
        steps = self.plan.steps[self._seen :] if self._let_go else self.plan.steps
        found = [pair for step in steps if self._there(step) for pair in self._entries_of(step)]
        if self.until is None:
            return found
        # Whether a nonlinearity would have followed is not known.
        return [(e, m) for e, m in found if e.kind != "preactivation" or e.sigma is not None]

    def fresh(self, let_go: bool) -> Iterator[Entry]:
        """The maps that have come since the last time, in execution order.

        Args:
            let_go: of each once it was seen.
        """
        self._let_go = let_go
        steps, log = self.plan.steps, self.log
        if let_go and len(log) - 1 in self.plan.spare:
            log[-1] = log[-1][:1]
        while self._seen < len(steps) and self._there(steps[self._seen]):
            step = steps[self._seen]
            self._seen += 1
            for entry, _ in self._entries_of(step):
                yield entry
            if let_go:
                for place in self.plan.last[self._seen - 1]:
                    log[place] = log[place][:1]
                self.wants.retention.forget()

    def _there(self, step: Step) -> bool:
        if self.until is not None and step.position >= self.until:
            return False
        return step.at < len(self.log)

    def _entries_of(self, step: Step) -> list[tuple[Entry, Emission]]:
        found: list[tuple[Entry, Emission]] = []
        shared: dict[int, Held] = {}
        for item, emission in zip(self._items(step), step.emissions, strict=True):
            if item is None:
                continue
            tensor, version, gradient, copied = item
            held = shared.get(id(tensor))
            if held is None:
                held = shared[id(tensor)] = Held(tensor, version, copied, gradient)
                held.arrival = self.wants.retention.arrival(tensor)
            entry = Entry(
                emission.kind,
                self.origin(emission.ref),
                held,
                emission.axes,
                emission.sigma,
                emission.path,
                emission.picked,
            )
            found.append((entry, emission))
        return found

    def _items(self, step: Step) -> list[Item | None]:
        """What was read for each emission of a step."""
        if not step.emissions:
            return []
        record = self.log[step.at]
        if not step.plain or type(record[1]) is list:
            read: list[Item | None] = record[1]
            return read
        slots: dict[str, Item] = {}
        y_grad, x_grad = record[-2:] if self.wants.gradients else (None, None)
        slots["y"] = (self._own(record[1]), record[2], y_grad, False)
        if step.plain == "xy":
            copied = len(record) == 6 and record[5] is True
            slots["x"] = (self._own(record[3]), record[4], x_grad, copied)
        return [slots[e.slot] for e in step.emissions]

    def release(self) -> list[Any]:
        """Let go of every tensor; what holds them still."""
        log, self.log = self.log, []
        return log


def _unbound(function: Any) -> Any:
    """A tensor's method without the tensor; any other function as it is."""
    if type(function) is BuiltinMethodType and issubclass(type(function.__self__), Tensor):
        return getattr(type(function.__self__), function.__name__)
    return function


class _Exchanged(tuple[Any, ...]):
    """A record whose tensors nobody else writes to."""

    __slots__ = ()


def _slot(emission: Emission) -> tuple[str, bool]:
    return emission.slot, emission.picked is not None


class LightMode(TorchFunctionMode):
    """Sees the nonlinearities that a module of torch calls itself, and lets the rest pass."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run
        self.names = {s.function for s in run.plan.at if s is not None and s.module is None}
        self.on = False
        self._pushed = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = describe(func)
        if not self.on or torch._C._current_graph_task_id() != -1:
            return func(*args, **(kwargs or {}))
        if known.opened is not None:  # as the tracer saw its inside
            with self:
                return known.opened(*args, **(kwargs or {}))
        if known.name in self.names:
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


def tag_outputs(output: Any, tags: dict[str, Tag], set_tag: Callable[[Tensor, Tag], None]) -> None:
    """Put a run's tags on the tensors it returned; one at a new place keeps its own."""
    for path, tensor in leaves(output):
        if tags.get(path) is not None:
            set_tag(tensor, tags[path])
