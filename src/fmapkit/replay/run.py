"""Tap: read a later call of a region with one tap per site.

Taps (see `replay/taps.py`) note what they see in the log of the `ReplayRun` that is under way.
Whether the log follows the plan is checked as a whole, when something depends on it and when the
run ends; tags are made when somebody reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from operator import itemgetter
from threading import get_ident
from typing import Any, TypeVar

from torch import Tensor, nn

from fmapkit.missed import RAISED
from fmapkit.paths import Expected, taps
from fmapkit.provenance import Label, out_of_place
from fmapkit.replay.plan import IN_KERNEL, KernelSteps, Plan, Step
from fmapkit.replay.run_log import RunLog, Slots
from fmapkit.replay.site_taps import LightMode, PlainSite, unbound_and_named
from fmapkit.replay.taps import CurrentRun
from fmapkit.selection import EarlyStop, Selection
from fmapkit.torchlib.autograd import graph_task
from fmapkit.torchlib.fused.kernels import KernelMaps
from fmapkit.torchlib.in_place import is_alone, someone_sees, with_new_memory
from fmapkit.torchlib.nested import tensors_in

_Read = TypeVar("_Read")
_module = itemgetter(0)


class ReplayRun(RunLog):
    """One call of a region, read by its plan."""

    __slots__ = (
        *("_checked", "_outer", "analyses", "before", "drop", "ended", "expected", "failure"),
        *("line", "marks", "mode", "module", "sites", "stop"),
    )

    def __init__(
        self,
        module: nn.Module,
        plan: Plan,
        wants: Selection,
        line: CurrentRun,
        expected: Expected,
        stop: EarlyStop | None,
        inputs: list[Label],
        base: dict[str, int] | None,
        drop: Callable[[Any], None],
        sites: Mapping[str, PlainSite],
        analyses: Callable[[ReplayRun], None] | None,
    ) -> None:
        super().__init__(plan, wants, inputs, base)
        self.module = module
        self.line = line
        self.expected = expected  # the path that it is taken to take
        self.ended = False  # early, by our stop
        self.failure: tuple[nn.Module, Exception] | None = None  # of a look of ours
        self.stop = stop  # what to end the pass by, after the last step
        self.drop = drop  # lets go of an older map
        self.sites = sites if self.how < 2 else {}
        self.analyses = analyses  # to be shown each map as soon as it is there
        self.before: dict[nn.Module, list[Slots]] = {}  # read before the call that overwrites it
        self.mode: LightMode | None = None
        self.marks: list[bool] = []  # per running child: whether the mode was on around it
        self._outer: Callable[[str, Any], Any] | None = None  # what another capture has tapped
        self._checked = 0  # how many entries of the log are known to follow the plan

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
        if self.line.cell is None or graph_task() != -1:
            return function
        if site in self.sites:
            tap = self.sites[site].instead_of(function)
            if tap is not None:
                return tap
        names = self.plan.sites.get(site)
        if names is None:
            return function
        inner = function
        while type(inner) is partial:
            inner = inner.func
        plain, name = unbound_and_named(inner)
        if name not in names:
            return function
        return partial(self._called_at_site, site, name, plain, function)

    def _called_at_site(
        self, site: str, name: str, plain: Any, function: Any, *args: Any, **kwargs: Any
    ) -> Any:
        while type(function) is partial:
            args, kwargs = (*function.args, *args), {**function.keywords, **kwargs}
            function = function.func
        if plain is not function:
            args = (function.__self__, *args)
        return self.call(name, plain, args, kwargs, site)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What runs here is none of the call: no tap notes it."""
        cell = self.line.exchange(None)
        seen = self.mode is not None and self.mode.pause()
        try:
            yield
        finally:
            if not self.lost:
                self.line.exchange(cell)
            if seen:
                self.light().resume()

    def finish(self) -> None:
        """Put back what `start` changed."""
        self.off()
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
            names = {s.function for s in self.plan.at if s is not None and s.module is None}
            self.mode = LightMode(names, self.call)
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
        if self.before.get(module) and any(e.before for e in step.map_specs):
            before = self.before[module].pop()
        elif step.map_specs:
            x = args[0] if step.key is None and args else (kwargs or {}).get(step.key)
            x_grad = self.watched(x)
            self.used(x_grad, output)
        if step.plain and before is None:
            record: tuple[Any, ...] = (module, self.own(output), self.version(output))
            if step.plain == "xy" and x is not None:
                record = (*record, self.own(x), self.version(x))
            if self.wants.gradients:
                record = (*record, self.watched(output), x_grad)
            self.log.append(record)
        else:
            self.log.append((module, self.read(step, x, output, x_grad, before)))
        self._noted()

    def next_kernel(self, module: nn.Module) -> KernelSteps | None:
        """The steps that come next, if a module's fused kernel shows them."""
        steps = self.plan.kernels.get(len(self.log)) if self.follows() else None
        return steps if steps is not None and steps.module is module else None

    def shown(self, steps: KernelSteps, maps: KernelMaps) -> None:
        """A fused kernel has run: these are its maps, by name."""
        for names in steps.names:
            step = self.plan.at[len(self.log)]
            assert step is not None
            self.log.append((IN_KERNEL, self.read_each(step, [maps[name] for name in names])))
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
        if step is None or not (step.shared or any(e.before for e in step.map_specs)):
            return
        x = args[0] if step.key is None and args else (kwargs or {}).get(step.key)
        if isinstance(x, Tensor):
            self.before.setdefault(module, []).append(self.read_before(step, x))

    def call(self, name: str, func: Any, args: Any, kwargs: Any, site: str | None = None) -> Any:
        """A nonlinearity or layer called by a scope itself, at a site if that is known."""
        step = self.step_at(site)
        if step is None or step.function != name:
            self.follows()  # which says where it left its plan, if that was before
            self.stray(name)
            return func(*args, **kwargs)
        if step.plain and not step.keeps and self.how < 2 and not self.wants.gradients:
            out = func(*args, **kwargs)
            self.note_plainly(site, step, args, kwargs, out)
            return out
        if not self.follows():
            return func(*args, **kwargs)
        x = next(iter(tensors_in(*args, kwargs)[step.place :]), None)
        x_grad, before = self.watched(x), None
        out = None
        other = out_of_place(func, args, kwargs) if step.keeps else None
        if other is not None and x is not None:
            function, its_args, its_kwargs = other
            z = self.before_in_place(x)
            if z is not None and with_new_memory(x, lambda: function(*its_args, **its_kwargs)):
                out, before = x, self._read_by(self.kept, step, z)
        if out is None:
            if x is not None and (step.shared or any(e.before for e in step.map_specs)):
                before = self._read_by(self.read_before, step, x)
            out = func(*args, **kwargs)
        self.used(x_grad, out)
        read = None if self.lost else self._read_by(self.read, step, x, out, x_grad, before)
        if read is not None:
            self.log.append((site, read))
            self._noted()
        return out

    def _read_by(self, look: Callable[..., _Read], step: Step, *given: Any) -> _Read | None:
        """What a look gives.

        Where it fails, the tensor is most likely one that no earlier call had here. Whether the
        call has left its path, or the failure is ours, shows as it ends.
        """
        try:
            return look(step, *given)
        except RAISED:
            raise
        except Exception as error:
            self.fail(self.module, error)
            return None

    def fail(self, module: nn.Module, error: Exception) -> None:
        """A look has failed in a module, or at a function that one calls."""
        self.stray(type(error).__name__)
        self.failure = self.failure or (module, error)

    def before_in_place(self, x: Any) -> Tensor | None:
        """An in-place σ is about to overwrite x: what will hold z if x is given new memory.

        None where it may not be; what is held of the memory is to be copied then.
        """
        if not self.wants.detach or self.wants.gradients or not is_alone(x):
            return None
        if self.plan.shares or self.how > 1:
            self.exchange(x, lambda t: t.data)
        z: Tensor = x.data
        return z

    def asks_next(self) -> bool:
        """Whether the step that comes next has a map; a call past the last one is noted as any."""
        at, steps = len(self.log), self.plan.at
        step = steps[at] if at < len(steps) else None
        return step is None or bool(step.map_specs)

    def step_at(self, site: str | None) -> Step | None:
        """The step that comes next, if it is a call at this site."""
        return self.plan.at[len(self.log)] if self._next_key() == site else None

    def note_plainly(
        self, site: str | None, step: Step | None, args: Any, kwargs: Any, output: Any
    ) -> None:
        """A function has run, and references to x and y are all that is held of it.

        Whether the log follows the plan is asked when the run ends, as it is of modules.
        """
        if step is None:
            if self.follows():
                self.stray("a function")
            return
        x = args[0] if args and not step.place else None
        if type(x) is not Tensor:
            x = next(iter(tensors_in(*args, kwargs)[step.place :]), None)
        record: tuple[Any, ...]
        if type(x) is Tensor and type(output) is Tensor and not output.is_inference():
            y = output.detach() if self.how and output.requires_grad else output
            if step.plain == "y":
                record = site, y, y._version
            else:
                x = x.detach() if self.how and x.requires_grad else x
                record = site, y, y._version, x, self.version(x)
        else:
            record = site, self.read_plainly(step, x, output)
        self.log.append(record)
        self._noted()

    def off(self) -> None:
        """No tap writes to this run any more."""
        if self.line.cell is not None and self.line.cell[1] in (2, 4):
            self.uncounted = True
        self.line.cell = self.line.run = None

    @property
    def complete(self) -> bool:
        """Whether every tap has fired."""
        return len(self.log) == len(self.plan.order)
