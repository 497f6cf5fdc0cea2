"""Follow: a watched pass that does what an earlier one did, step by step.

Each step is compared, and what it meant then it means now: the same maps are held under the same
labels. At the first step that no known road goes on with, the tracer takes over, as if it had seen
the pass from its start.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fmapkit._candidates import may_be_sigma
from fmapkit._departing import tell
from fmapkit._flow import carried
from fmapkit._following_maps import FollowedMaps
from fmapkit._following_suspects import FollowedSuspects
from fmapkit._frames import Frame
from fmapkit._functions import Function, describe
from fmapkit._nested import leaves, tensors_in
from fmapkit._noting import (
    Noter,
    alike,
    beside_the_point,
    results_of,
    returned,
    same_shape,
)
from fmapkit._operands import NO, SAME, VARIED
from fmapkit._origin import Tag, given
from fmapkit._replay import Run
from fmapkit._script import Script, Step
from fmapkit._seen import Seen
from fmapkit._standing import Standing
from fmapkit.nonlinearities import module_sigma

if TYPE_CHECKING:
    from fmapkit._live import Live
    from fmapkit._stands import Way
    from fmapkit._trace import Tracer

__all__ = ["Follower"]

ASTRAY = "it returned something of another form than before; it is looked into from now on"

# Other than -1 in a backward pass: activation checkpointing runs the forward again there.
_graph_task = torch._C._current_graph_task_id


class Follower:
    """Follows a script through one pass.

    Args:
        tracer: of the pass, which takes over where it departs.
        script: the known roads.
        given: the tensors that came in.
        live: what is under way.
        way: by which the stands find us.
        departed: called when the tracer takes over.
    """

    def __init__(
        self,
        tracer: Tracer,
        script: Script,
        given: list[Tensor],
        live: Live,
        way: Way,
        departed: Callable[[], None],
    ) -> None:
        self._tracer = tracer
        self._live = live
        self._way = way
        self._departed = departed
        self._script = script
        self._at = script.start
        self._told: Step | None = None  # up to here, what tensors carry was looked up
        self._seen = Seen(tracer.tags)
        self._refs = self._seen.refs
        self._note = self._refs.append
        self._maps = FollowedMaps(tracer)
        self._running: list[Frame] = []  # scopes, outermost first
        self._suspects = FollowedSuspects(tracer, self._maps)
        self._watched = self._suspects.frames  # those of them that may be one nonlinearity
        self._unit: Step | None = None
        self._given: list[Tensor] = []  # to the unit that is running
        self._seen.note(given, script.start.results)

    # -- torch functions ----------------------------------------------------------------------

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A scope calls a torch function: run it."""
        step = self._at.then
        if step is not None and step.function is func and _graph_task() == -1:
            assert step.operands is not None
            if step.operands.match(args, kwargs, self._refs, self._seen.source) == SAME:
                if not step.simple or self._watched:
                    return self._follow([step], False, func, args, kwargs)
                out = func(*args, **kwargs)
                try:
                    if (
                        isinstance(out, Tensor)
                        and out.dim() == step.dims
                        and (out is args[0]) is step.itself
                        and (step.rests is None or step.rests.hold((*args, out)))
                    ):
                        self._note(weakref.ref(out))
                        self._at = step
                        return out
                    if self._gives(step, False, args, kwargs, out):
                        self._at = step
                        return out
                except Exception as error:  # ours, not the user's: named in `missed`, never raised
                    self.fail(error)
                    return out
                return self._after_all(step.known, func, args, kwargs, out)
        return self._look(func, args, kwargs)

    def _look(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The same, where it is not just what comes next."""
        known, tracer = describe(func), self._tracer
        if known.silent or _graph_task() != -1:
            return func(*args, **kwargs)
        if known.opened is not None:
            with tracer:
                return known.opened(*args, **kwargs)
        source, step = self._seen.source, self._at.then
        varied: list[Step] = []
        while step is not None:
            if step.function == func:
                assert step.operands is not None
                found = step.operands.match(args, kwargs, self._refs, source)
                if found == SAME:
                    return self._follow([step], False, func, args, kwargs)
                if found == VARIED and step.loose:
                    varied.append(step)
            step = step.instead
        if varied:
            return self._follow(varied, True, func, args, kwargs)
        if not known.never_writes or "out" in kwargs:
            self._written(known, args, kwargs)
        if not beside_the_point(known, args, kwargs, source):
            return self._otherwise(func, args, kwargs)
        out = func(*args, **kwargs)
        for frame in self._watched:
            frame.step(known.name, args, kwargs, out, self._tag)
        return out

    def _follow(self, steps: list[Step], varied: bool, func: Any, args: Any, kwargs: Any) -> Any:
        """A call that is a known step.

        Args:
            steps: which it may be; what comes of it tells.
            varied: it is given other numbers than then.
            func: the function.
            args: its positional arguments.
            kwargs: its keyword arguments.
        """
        event, held, step = None, None, steps[0]
        if step.caller is not None:
            if self._tracer.caller(self._running[-1].module) is not step.caller:
                return self._otherwise(func, args, kwargs)
        try:
            if step.writes:
                self._written(step.known, args, kwargs)
            if step.makings:
                held = self._maps.before(step, args, kwargs)
                if held is None:
                    return self._otherwise(func, args, kwargs)
            if self._watched:
                event = self._suspects.sigma(step, self._running[-1], args, kwargs, held)
        except Exception as error:  # ours, not the user's: named in `missed`, never raised
            self.fail(error)
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        try:
            for step in steps:
                if self._gives(step, varied, args, kwargs, out):
                    self._at = step
                    if held is not None:
                        self._maps.made(step, held, out)
                    if step.dropped:
                        self._maps.drop(step)
                    if self._watched:
                        self._suspects.ran(
                            step, self._running[-1], event, args, kwargs, out, self._tag
                        )
                    return out
        except Exception as error:
            self.fail(error)
            return out
        return self._after_all(step.known, func, args, kwargs, out)

    def _gives(self, step: Step, varied: bool, args: Any, kwargs: Any, out: Any) -> bool:
        """Whether a call results in what it did then; if so, its results get their slots."""
        results = results_of(step.known, args, out)
        if step.ranks != tuple([t.dim() for t in results]):
            return False
        if (bool(args) and out is args[0]) is not step.itself:
            if returned(tensors_in(*args, kwargs), results) is not step.itself:
                return False
        if step.rests is not None:
            if not step.rests.hold([*tensors_in(*args, kwargs), *results]):
                if not step.loose:
                    return False
                varied = True
        if varied and not self._carries(step, args, kwargs, out):
            return False
        if step.dims >= 0:
            self._note(weakref.ref(out))
            return True
        self._seen.note(results, step.results)
        return True

    def _written(self, known: Function, args: Any, kwargs: Any) -> None:
        for target in known.writes(args, kwargs):
            self._tracer.aliases.before_write(target)

    def _catch_up(self) -> None:
        """What each tensor carries, as far as the pass has come."""
        behind: list[Step] = []
        at: Step | None = self._at
        while at is not None and at is not self._told:
            behind.append(at)
            at = at.before
        for step in reversed(behind):
            self._seen.carry += [given(tag) for tag in step.results if tag is not None]
        self._told = self._at

    def _tag(self, value: Any) -> Tag:
        """What a value carries."""
        self._catch_up()
        return self._seen.tag(value)

    def _otherwise(self, func: Any, args: Any, kwargs: Any) -> Any:
        """No known road goes on with this call."""
        self.depart()
        return self._tracer.__torch_function__(func, (), args, kwargs)

    def _after_all(self, known: Function, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
        """The call looked as before, but what it returned does not."""
        step = self._at.then
        while step is not None:  # perhaps as it did in yet another pass
            if step.function == func and self._did(step, args, kwargs, out):
                self._at = step
                if step.makings:
                    self._maps.made(step, [None] * len(step.makings), out)
                return out
            step = step.instead
        if known.sigma is not None:  # what it was given may be overwritten
            self._tracer.miss(self._tracer.names.of(self._running[-1].module), ASTRAY)
        self.depart()
        return self._tracer.traced(known, func, args, kwargs, out)

    def _did(self, step: Step, args: Any, kwargs: Any, out: Any) -> bool:
        """Whether a call that has run is that step, of which nothing had to be held before."""
        if self._watched or step.writes or step.dropped or any(m.source >= 0 for m in step.makings):
            return False
        assert step.operands is not None
        found = step.operands.match(args, kwargs, self._refs, self._seen.source)
        return found == SAME and self._gives(step, False, args, kwargs, out)

    def _carries(self, step: Step, args: Any, kwargs: Any, out: Any) -> bool:
        """Whether a call with other numbers results in the same."""
        tags = carried(step.known.name, args, kwargs, out, self._tag)
        return _same(tags, step.results)

    # -- modules ------------------------------------------------------------------------------

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> str:
        """A module begins: "begin" or "unit" if a known road goes on so; "" if none does."""
        step = self._at.then
        while step is not None:
            if step.module is module and step.kind in ("begin", "unit"):
                if step.kind == "unit":
                    assert step.operands is not None
                    with torch._C.DisableTorchFunction():
                        match = step.operands.match(args, kwargs, self._refs, self._seen.source)
                    if match != NO:
                        self._unit = step
                        self._given = tensors_in(*args, kwargs)
                        return "unit"
                else:
                    frame = Frame.of(module, args, kwargs, len(self._tracer.events))
                    if step.sizes is None or self._of_its_kind(step, frame):
                        self._running.append(frame)
                        if step.scope != "plain":
                            with torch._C.DisableTorchFunction():
                                self._suspects.open(step, frame, self._tag)
                        self._at = step
                        return "begin"
            step = step.instead
        self.depart()
        return ""

    def _of_its_kind(self, step: Step, frame: Frame) -> bool:
        """Whether the tracer would take a module for what it took it for then."""
        x = frame.x
        with torch._C.DisableTorchFunction():
            if step.scope == "plain" and (x is None or not _fits(x, step.sizes)):
                return True
            kind = "plain"
            if module_sigma(frame.module) is not None:
                kind = "sigma"
            elif x is not None and may_be_sigma(frame.module, frame.args, frame.kwargs, x):
                kind = "candidate"
            if kind == "plain" or step.operands is None:
                return kind == step.scope
            return kind == step.scope and self._matches(step, x)

    def _matches(self, step: Step, value: Any) -> bool:
        assert step.operands is not None
        return step.operands.match((value,), {}, self._refs, self._seen.source) == SAME

    def leave(self, module: nn.Module, output: Any) -> bool:
        """A module ends; whether a known road goes on so."""
        frame = self._running[-1] if self._running else None
        step = self._at.then if frame is not None and frame.module is module else None
        while step is not None:
            if step.kind == "end" and step.module is module and self._ends(step, output):
                assert frame is not None
                self._running.pop()
                self._at = step
                with torch._C.DisableTorchFunction():
                    self._left(step, frame, output)
                return True
            step = step.instead
        self.depart()
        return False

    def broken_off(self, module: nn.Module) -> None:
        """A module's call was left by what runs no hooks."""
        places = [i for i, frame in enumerate(self._running) if frame.module is module]
        if self._tracer.follower is self and places:
            del self._running[places[-1] :]
            self._watched[:] = [f for f in self._watched if f in self._running]
            self.depart()

    def _ends(self, step: Step, output: Any) -> bool:
        """Whether a module returns what it returned before."""
        with torch._C.DisableTorchFunction():
            if step.scope != "plain":
                if not self._matches(step, output):
                    return False
                if step.kept is not same_shape(self._running[-1].x, output):
                    return False
            elif step.makings:
                pieces = leaves(output)
                if step.paths != tuple([path for path, _ in pieces]):
                    return False
                assert step.operands is not None
                tensors, source = [t for _, t in pieces], self._seen.source
                if step.operands.match(tensors, {}, self._refs, source) != SAME:
                    return False
            if step.results and step.ranks != tuple([t.dim() for t in tensors_in(output)]):
                return False
        return True

    def _left(self, step: Step, frame: Frame, output: Any) -> None:
        pieces = dict(leaves(output)) if step.makings else {}
        for making in step.makings:
            held = frame.x_held if making.source >= 0 else None
            self._maps.hold(making, held or self._tracer.aliases.reference(pieces[making.path]))
        if step.scope != "plain":
            self._suspects.close(step, frame, output)
        self._maps.drop(step)
        if step.results:
            self._seen.note(tensors_in(output), step.results)

    def leaf(self, stand: Standing, args: Any, kwargs: Any) -> Any:
        """A module is called that is not looked into: call it."""
        module, live, held = stand.module, self._live, None
        live.trace_off()  # first of all: it would see what we look at
        try:
            try:
                step = self._leaf(module, args, kwargs)
                if step is not None and step.makings:
                    held = self._maps.before(step, args, kwargs)
                    step = step if held is not None else None
                if step is None:
                    self.depart()
            except Exception as error:  # ours, not the user's: named in `missed`, never raised
                step = None
                self.fail(error)
            if step is not None:
                out = stand.inner(*args, **kwargs)
                try:
                    self._leaf_left(step, args, kwargs, out, held)
                except Exception as error:
                    self.fail(error)
                return out
        finally:
            live.trace_on()
        return stand.inner(*args, **kwargs)

    def _leaf(self, module: nn.Module, args: Any, kwargs: Any) -> Step | None:
        """The step that such a call is."""
        step = self._at.then
        while step is not None:
            if step.module is module and step.kind == "leaf":
                assert step.operands is not None
                if step.operands.match(args, kwargs, self._refs, self._seen.source) == SAME:
                    if step.state is None or step.state == step.unit.state():
                        if step.rests is None or step.rests.hold(tensors_in(*args, kwargs)):
                            return step
            step = step.instead
        return None

    def _leaf_left(self, step: Step, args: Any, kwargs: Any, out: Any, held: Any) -> None:
        """It has run."""
        if step.dims >= 0 and args:
            known = isinstance(out, Tensor) and out.dim() == step.dims
            known = known and (out is args[0]) is step.itself
        else:
            known = self._as_known(step, args, kwargs, out)
        if not known:
            self._leaf_astray(step, out)
            return
        if step.dims >= 0:
            self._note(weakref.ref(out))
        else:
            self._seen.note(tensors_in(out), step.results)
        self._at = step
        if held is not None:
            self._maps.made(step, held, out)
        if step.dropped:
            self._maps.drop(step)

    def _as_known(self, step: Step, args: Any, kwargs: Any, out: Any) -> bool:
        """Whether what a module returned is of the form that it had."""
        results = tensors_in(out)
        if step.ranks != tuple([t.dim() for t in results]):
            return False
        return returned(tensors_in(*args, kwargs), results) is step.itself

    def _leaf_astray(self, step: Step, out: Any) -> None:
        """A module that is not looked into has run, and returned something of another form."""
        tracer, results = self._tracer, tensors_in(out)
        assert step.module is not None
        self.depart()
        if tracer.noter is not None:
            tracer.noter.stop()
        ranks = tuple([t.dim() for t in results])
        seen_through = not (step.makings or step.dropped or step.counted or step.claimed)
        if not seen_through or step.ranks != ranks:
            tracer.no_leaf(step.module)
            tracer.miss(tracer.names.of(step.module), ASTRAY)
            tracer.enter_inputs(results, {})
            return
        for tensor, tag in zip(results, step.results, strict=True):
            tracer.set_tag(tensor, tag)

    # -- units --------------------------------------------------------------------------------

    @property
    def unit(self) -> Step | None:
        """The step of the unit that is running."""
        return self._unit

    def unit_left(self, run: Run, output: Any) -> bool:
        """A unit has run; whether it gave what it gave before."""
        step = self._unit
        assert step is not None
        pieces = leaves(output)
        results, paths = [t for _, t in pieces], tuple(path for path, _ in pieces)
        run.know(step.origins)
        entries = run.entries()
        ranks = tuple([t.dim() for t in results])
        if (
            run.lost
            or paths != step.paths
            or ranks != step.ranks
            or len(entries) != len(step.pending)
            or returned(self._given, results) is not step.itself
        ):
            run.know({})  # its own, which nothing has claimed yet
            self.depart()
            return False
        self._unit = None
        self._given = []
        for entry in entries:
            self._maps.add(entry)
            if entry.held is not None:
                self._tracer.aliases.watch(entry.held)
        self._seen.note(results, step.results)
        self._at = step
        self._maps.drop(step)
        return True

    def fail(self, error: Exception) -> None:
        """A fault of our own: nothing of the pass is captured any more, and `missed` says so."""
        self._way.follower = None
        self._tracer.fail(error)

    # -- where it departs ---------------------------------------------------------------------

    @property
    def come(self) -> int:
        """How far the pass has followed: so many tensors have got their slots."""
        return len(self._refs)

    def depart(self) -> None:
        """The tracer takes over, as if it had seen the pass from its start."""
        tracer, path = self._tracer, self._at.path()
        tracer.follower = self._unit = self._way.follower = None
        self._script.left_at = self.come
        with torch._C.DisableTorchFunction():
            try:
                self._catch_up()
                entries = self._maps.entries
                tell(tracer, path, self._seen, entries, self._running, self._watched)
                tracer.frames += self._running
                if self._script.open:
                    tracer.noter = Noter(tracer, self._script, self._at, self._seen, entries)
            except Exception as error:  # ours, not the user's: named in `missed`, never raised
                self.fail(error)
            self._departed()


def _fits(x: Tensor, sizes: frozenset[int] | None) -> bool:
    """Whether the channels of x, first or last, are of these sizes."""
    shape = x.shape
    return sizes is not None and (not sizes or sizes <= {*shape[1:2], *shape[-1:]})


def _same(tags: Any, results: tuple[Tag, ...]) -> bool:
    """Whether that is what the results of a call carried."""
    found = tags if isinstance(tags, list) else [tags] if results else []
    return len(found) == len(results) and all(map(alike, found, map(given, results)))
