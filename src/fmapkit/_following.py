"""Follow: a watched pass that does what an earlier one did, step by step.

Each step is compared, and what it meant then it means now: the same maps are held under the same
labels. At the first step that no known road goes on with, the tracer takes over, as if it had seen
the pass from its start.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fmapkit._events import Event
from fmapkit._flow import carried
from fmapkit._frames import Frame, running_module
from fmapkit._functions import Function
from fmapkit._nested import leaves, tensors_in
from fmapkit._noting import Noter, alike, beside_the_point, results_of
from fmapkit._operands import SAME, VARIED
from fmapkit._origin import NOWHERE, Flow, Origin, Tag
from fmapkit._replay import Run
from fmapkit._script import Making, Script, Step
from fmapkit._seen import Seen
from fmapkit._store import Entry, Held

if TYPE_CHECKING:
    from fmapkit._trace import Tracer

__all__ = ["Follower"]


class Follower:
    """Follows a script through one pass.

    Args:
        tracer: of the pass, which takes over where it departs.
        script: the known roads.
        given: the tensors that came in.
        departed: called when the tracer takes over.
    """

    def __init__(
        self, tracer: Tracer, script: Script, given: list[Tensor], departed: Callable[[], None]
    ) -> None:
        self._tracer = tracer
        self._departed = departed
        self._script = script
        self._at = script.start
        self._seen = Seen(tracer.tags)
        self._put, self._refs = self._seen.put, self._seen.refs
        self._entries: list[Entry] = []  # each that a step has made, in order
        self._running: list[tuple[nn.Module, Any, Any]] = []  # scopes, outermost first
        self._unit: Step | None = None
        for tensor, tag in zip(given, script.start.results, strict=True):
            if tag is not None:
                self._put(tensor, tag)

    # -- torch functions ----------------------------------------------------------------------

    def call(self, known: Function, func: Any, args: Any, kwargs: Any) -> Any:
        """A scope calls a torch function: run it."""
        step, seen, tracer = self._at.then, self._seen, self._tracer
        while step is not None:
            if step.function == func:
                assert step.operands is not None
                found = step.operands.match(args, kwargs, self._refs, seen.source)
                if found == SAME or (found == VARIED and step.loose):
                    break
            step = step.instead
        for target in known.writes(args, kwargs):
            tracer.aliases.before_write(target)
        if step is None:
            if beside_the_point(known, args, kwargs, seen.source):
                return func(*args, **kwargs)
            return self._otherwise(func, args, kwargs)
        held = self._before(step, args, kwargs) if step.makings else None
        out = func(*args, **kwargs)
        if step.dims >= 0:
            if not isinstance(out, Tensor) or out.dim() != step.dims:
                return self._after_all(known, func, args, kwargs, out)
            if found == VARIED and not self._carries(step, args, kwargs, out):
                return self._after_all(known, func, args, kwargs, out)
            self._put(out, step.results[0])
        else:
            results = results_of(known, args, out)
            if len(results) != len(step.results) or (
                found == VARIED and not self._carries(step, args, kwargs, out)
            ):
                return self._after_all(known, func, args, kwargs, out)
            for tensor, tag in zip(results, step.results, strict=True):
                if tag is not None:
                    self._put(tensor, tag)
        self._at = step
        if held is not None:
            self._made(step, held, out)
        if step.dropped:
            self._drop(step)
        return out

    def _otherwise(self, func: Any, args: Any, kwargs: Any) -> Any:
        """No known road goes on with this call."""
        tracer = self._tracer
        inner = self.depart()
        out = tracer.__torch_function__(func, (), args, kwargs)
        if inner is not None and tracer.frames and tracer.frames[-1] is inner:
            tracer.frames.pop()  # it has no hooks to tell of its end
        return out

    def _after_all(self, known: Function, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
        """The call looked as before, but what it returned does not."""
        inner = self.depart()
        out = self._tracer.traced(known, func, args, kwargs, out)
        if inner is not None and self._tracer.frames[-1] is inner:
            self._tracer.frames.pop()
        return out

    def _carries(self, step: Step, args: Any, kwargs: Any, out: Any) -> bool:
        """Whether a call with other numbers results in the same."""
        tags = carried(step.known.name, args, kwargs, out, self._seen.tag)
        return _same(tags, step.results)

    # -- maps ---------------------------------------------------------------------------------

    def _before(self, step: Step, args: Any, kwargs: Any) -> list[Held | None]:
        """Hold what the maps of a call need of its arguments."""
        tracer = self._tracer
        operands = tensors_in(*args, kwargs)
        found: list[Held | None] = []
        with torch._C.DisableTorchFunction():  # another capture's tracer may look
            for making in step.makings:
                if making.source < 0:
                    found.append(None)
                elif making.before:
                    found.append(tracer.record.copy(operands[making.source]))
                else:
                    found.append(tracer.aliases.reference(operands[making.source]))
        return found

    def _made(self, step: Step, held: list[Held | None], out: Any) -> None:
        """The maps of a step, of which some tensors are held already."""
        aliases = self._tracer.aliases
        with torch._C.DisableTorchFunction():
            for making, one in zip(step.makings, held, strict=True):
                if one is None:
                    whole = isinstance(out, Tensor)
                    one = aliases.reference(out if whole else tensors_in(out)[-1 - making.source])
                self._hold(making, one)

    def _hold(self, making: Making, held: Held) -> None:
        if making.picked is not None:
            assert making.axes is not None
            held = self._tracer.record.taken(held, making.axes, making.picked)
        held.wanted = True
        self._add(
            Entry(
                making.kind,
                making.origin,
                held,
                making.axes,
                making.sigma,
                making.path,
                making.picked,
            )
        )

    def _add(self, entry: Entry) -> None:
        self._entries.append(entry)
        self._tracer.current.segments.append(entry)

    def _drop(self, step: Step) -> None:
        for place in step.dropped:
            self._entries[place].held = None

    # -- modules ------------------------------------------------------------------------------

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> str:
        """A module begins: "begin" or "unit" if a known road goes on so; "" if none does."""
        step = self._at.then
        while step is not None:
            if step.module is module and step.kind != "end":
                if step.kind == "begin":
                    self._running.append((module, args, kwargs))
                    self._at = step
                    return "begin"
                assert step.operands is not None
                found = step.operands.match(args, kwargs, self._refs, self._seen.source)
                if found:
                    self._unit = step
                    return "unit"
            step = step.instead
        self.depart()
        return ""

    def leave(self, module: nn.Module, output: Any) -> bool:
        """A module ends; whether a known road goes on so."""
        step = self._at.then
        while step is not None:
            if step.kind == "end" and step.module is module and self._runs(module):
                pieces = dict(leaves(output)) if step.makings else {}
                if all(m.path in pieces for m in step.makings):
                    self._running.pop()
                    self._at = step
                    with torch._C.DisableTorchFunction():
                        for making in step.makings:
                            self._hold(making, self._tracer.aliases.reference(pieces[making.path]))
                    return True
            step = step.instead
        self.depart()
        return False

    def _runs(self, module: nn.Module) -> bool:
        return bool(self._running) and self._running[-1][0] is module

    # -- units --------------------------------------------------------------------------------

    @property
    def unit(self) -> Step | None:
        """The step of the unit that is running."""
        return self._unit

    def unit_left(self, run: Run, output: Any) -> bool:
        """A unit has run; whether it gave what it gave before."""
        step = self._unit
        assert step is not None
        results = [t for _, t in leaves(output)]
        run.know(step.origins)
        entries = run.entries()
        if run.lost or len(results) != len(step.results) or len(entries) != len(step.pending):
            self.depart()
            return False
        self._unit = None
        for entry in entries:
            self._add(entry)
            if entry.held is not None:
                self._tracer.aliases.watch(entry.held)
        for tensor, tag in zip(results, step.results, strict=True):
            if tag is not None:
                self._put(tensor, tag)
        self._at = step
        self._drop(step)
        return True

    # -- where it departs ---------------------------------------------------------------------

    def depart(self) -> Frame | None:
        """The tracer takes over, as if it had seen the pass from its start.

        Returns:
            The frame of a module that runs without hooks of ours.
        """
        tracer, path = self._tracer, self._at.path()
        tracer.follower = self._unit = None
        with torch._C.DisableTorchFunction():
            self._tell(path)
            for module, args, kwargs in self._running:
                tracer.frames.append(Frame.of(module, args, kwargs, len(tracer.events)))
            tracer.noter = Noter(tracer, self._script, self._at, self._seen, self._entries)
            self._departed()
            running = running_module(2)
            if running is not None and running in tracer.see_through:
                tracer.frames.append(Frame(running, (), {}, len(tracer.events)))
                return tracer.frames[-1]
        return None

    def _tell(self, path: list[Step]) -> None:
        """Tell the tracer what it would have seen."""
        tracer, seen = self._tracer, self._seen
        for reference, tag in zip(seen.refs, seen.carry, strict=True):
            tensor = reference()
            if tensor is not None:
                tracer.set_tag(tensor, tag)
        _unclaim(path)
        entries = iter(self._entries)
        for step in path:
            tracer.counts.update(step.counted)
            for origin in step.claimed:
                origin.claimed = True
            if step.kind == "unit":
                for pending in step.pending:
                    entry = next(entries)
                    if pending and entry.held is not None:
                        tracer.pending.setdefault(id(entry.origin), []).append(entry)
                continue
            events: dict[int, Event] = {}
            for making in step.makings:
                entry = next(entries)
                kind = "sigma" if making.sigma is not None else "layer"
                if id(making.origin) not in events:
                    scope = self._running[-1][0] if self._running else tracer.names.model
                    event = events[id(making.origin)] = Event(kind, scope, step.function)
                    event.origin = making.origin
                    tracer.events.append(event)
                if entry.held is not None:
                    slot = "x" if making.source >= 0 else "y"
                    events[id(making.origin)].entries.append((slot, entry))


def _unclaim(path: list[Step]) -> None:
    """Take back what the pass that was noted came to know of its origins later."""
    origins: list[Origin] = [m.origin for s in path for m in s.makings]
    origins += [t.origin for s in path for t in s.results if isinstance(t, Flow)]
    for origin in origins:
        if origin is not NOWHERE:
            origin.claimed = False
    for step in path:
        for ref, origin in (step.origins or {}).items():
            origin.claimed = ref.claimed


def _same(tags: Any, results: tuple[Tag, ...]) -> bool:
    """Whether that is what the results of a call carried."""
    found = tags if isinstance(tags, list) else [tags] if results else []
    return len(found) == len(results) and all(map(alike, found, results))
