"""Learn: the first call of a kind that a unit gets runs under the tracer, and leaves a plan.

What the tracer sees is a matter of `_trace.py`, what a plan is, of `_plan.py`. The end of a pass
that was traced, or a part of it, is here, too.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from fmapkit._asked import Asked
from fmapkit._candidates import is_torchs
from fmapkit._events import Event
from fmapkit._frames import Frame
from fmapkit._live import Lesson, Live
from fmapkit._missed import Misses
from fmapkit._nested import modules_in, tensors_in
from fmapkit._origin import Flow, Tag
from fmapkit._placing import Placing
from fmapkit._plan import make_plan
from fmapkit._remembered_tensors import Remembering
from fmapkit._sharded import is_wrapped
from fmapkit._store import Held, storage_of, storage_users
from fmapkit._trace import Tracer
from fmapkit._units import Units
from fmapkit.paths import ControlPaths, Sizes

__all__ = ["Learning"]

REST = (
    "in a pass, a part of it took a way through its code that no earlier pass had taken; the maps "
    "of that pass are not kept"
)
BROKEN = (
    "in a pass, an exception ended the call of a part of it, and the pass went on; the maps of "
    "that pass are not complete, and that part is traced from then on"
)


class Learning:
    """Learns units.

    Args:
        asked: by the capture.
        live: what is under way.
        misses: of the capture.
        units: of the model.
        placing: of its hooks.
        paths: of its passes.
    """

    def __init__(
        self,
        asked: Asked,
        live: Live,
        misses: Misses,
        units: Units,
        placing: Placing,
        paths: ControlPaths,
    ) -> None:
        self._model = asked.model
        self._names = asked.names
        self._live = live
        self._misses = misses
        self._units = units
        self._placing = placing
        self._paths = paths

    def enter(
        self,
        module: nn.Module,
        key: Any,
        state: int,
        sizes: Sizes,
        args: Any,
        kwargs: Any,
        inputs: list[Tag],
    ) -> Any:
        """A call of a unit begins that there is no plan for.

        Args:
            module: the unit.
            key: the kind of call; None if it can be replayed never.
            state: that the unit is in.
            sizes: of its inputs.
            args: its positional arguments.
            kwargs: its keyword arguments.
            inputs: what its tensors carry; empty where nothing around it is traced.

        Returns:
            The arguments that it is to get instead; None for its own.
        """
        self._placing.no_taps()
        tracer = self._live.tracer
        seen = {}
        if tracer is None:
            tracer = self._live.new_tracer()
            tracer.enter_inputs(args, kwargs)
        else:
            seen = tracer.tags.seen()
        self._placing.in_lesson(module)
        tracer.learning += 1
        tracer.aliases.written.clear()
        tracer.edited = False
        position = tracer.firings.clock()
        tracer.moments.clear()
        frame = tracer.enter(module, args, kwargs)
        frame.position = position
        frame.counts = Counter(tracer.counts)
        self._live.lesson = Lesson(module, frame, key, state, sizes, inputs, seen)
        self._paths.begin_lesson(module)
        tracer.firings.site_of = self._paths.site_of
        self._live.trace_on()
        return frame.replaced

    def leave(self, module: nn.Module, output: Any, failed: bool) -> Any:
        """The call has ended.

        Args:
            module: the unit.
            output: what it returns.
            failed: by an exception, and returns nothing.

        Returns:
            The output that is to be returned instead; None for its own.
        """
        tracer, lesson = self._live.tracer, self._live.lesson
        assert lesson is not None and tracer is not None
        frame = lesson.frame
        replaced = tracer.leave(module, None if failed else output)
        tracer.learning -= 1
        tracer.firings.site_of = None
        self._live.lesson = None
        items = self._paths.since(frame.position)
        complete, hopeless = self._paths.end_lesson(items, module)
        if hopeless:
            self._open(*hopeless)
        if tracer.edited:  # from the next pass on, only the parts below that need it are traced
            self._open(module)
        elif not failed and tracer.failed is None:
            events = tracer.events[frame.start :]
            _check_held(events)
            useful = complete and lesson.key is not None and not hopeless
            decides = self._decides(module, tracer) or self._remembers(lesson, tracer, output)
            decides = decides or self._reaches_out(lesson, tracer, output)
            if not decides and useful and not any(map(_sharded, events)):
                self._keep(lesson, output if replaced is None else replaced, tracer, items)
            tracer.let_go(events)
        return replaced

    def _decides(self, module: nn.Module, tracer: Tracer) -> bool:
        """Whether parts of the unit are to be traced in every pass, since they decide by data."""
        deciding = tracer.deciding.intersection(module.modules())
        if deciding:
            self._open(*deciding)
        return bool(deciding)

    def _reaches_out(self, lesson: Lesson, tracer: Tracer, output: Any) -> bool:
        """Whether the unit wrote to tensors that it was not given, as through a view of them."""
        frame = lesson.frame
        known = {id(t) for t in tensors_in(*frame.args, frame.kwargs, output)}
        found = tracer.tags.others_changed(lesson.seen, known)
        if found:
            self._open(lesson.module)
        return found

    def _remembers(self, lesson: Lesson, tracer: Tracer, output: Any) -> bool:
        """Whether tensors of the pass are kept where a later pass may read them."""
        frame, unit = lesson.frame, lesson.module
        passed = {id(t) for t in tensors_in(*frame.args, frame.kwargs)}

        def is_of_pass(tensor: Tensor) -> bool:
            return id(tensor) not in passed and isinstance(tracer.tag(tensor), Flow)

        twins = self._paths.twins
        remembering = Remembering(is_of_pass, twins.reads)
        found = remembering.modules(unit)
        if remembering.given((*frame.args, *frame.kwargs.values())):
            found.append(unit)
        if remembering.functions(twins.functions()):
            found += [m for m in modules_in(unit) if m._modules or not is_torchs(m)]
        if found:
            self._open(*found)
        return bool(found)

    def _open(self, *modules: nn.Module) -> None:
        """From the next pass on, these are traced in every pass."""
        self._units.open(*modules)
        self._placing.scopes_changed()

    def _keep(self, lesson: Lesson, output: Any, tracer: Tracer, items: list[Any]) -> None:
        """Keep the plan of a call, for others that take its path."""
        module, frame = lesson.module, lesson.frame
        arguments = tensors_in(*frame.args, frame.kwargs)
        _copy_what_is_used_again(tracer, frame, [*arguments, *tensors_in(output)])
        plan = make_plan(tracer, frame, output, lesson.inputs, arguments)
        unit = self._units.of(module)
        state = unit.state_of(items, lesson.key, lesson.state, lesson.sizes)
        if state is None:
            self._open(module, *unit.differing(items, lesson.key, lesson.sizes))
            return
        known = unit.paths(lesson.key, state)
        if known.wavers(items, lesson.sizes):
            self._open(module, *known.leaves_at(items, lesson.sizes)[1])
            return
        self._paths.twins.tap(plan.sites)
        moments = [(at - frame.position, m) for at, m in tracer.moments]
        self._placing.taps(module, known.learn(items, lesson.sizes, plan, moments))

    def finish(self, tracer: Tracer, failed: bool) -> None:
        """The traced pass has ended.

        Args:
            tracer: of the pass.
            failed: by an exception.
        """
        self._live.trace_out()
        if tracer.lost and not failed:
            broken = tracer.broken
            if broken is not None:  # somebody handles its exceptions
                self._open(broken)
            self._misses.add(self._names.of(self._model), REST if broken is None else BROKEN)
        _check_held(tracer.events)
        for module in tracer.unhooked:
            self._misses.add(
                self._names.of(module),
                "it was called on its own, so far only as a part of another module: in this pass "
                "it was seen by the functions it called, not as a whole; later on as a module",
            )
            self._units.direct.update(self._model.modules())
            self._placing.scopes_changed()
        tracer.end()

    def drop(self) -> None:
        """The pass has broken off, perhaps in the middle of a lesson."""
        live = self._live
        live.lesson = None
        live.trace_out()
        if live.tracer is not None:
            live.tracer.end()


def _check_held(events: list[Event]) -> None:
    """Notice writes, to what is held of what ran, that nobody announced."""
    for event in events:
        for held in (event.x_held, event.y_held):
            if held is not None:
                held.check()


def _copy_what_is_used_again(tracer: Tracer, frame: Frame, passed: list[Tensor]) -> None:
    """Copy maps, now and in later calls, that lie in memory which a unit writes to, and keeps.

    Its next call, in the same pass perhaps, overwrites them.

    Args:
        tracer: of the pass.
        frame: of the unit's call.
        passed: tensors that were given to it, or that it returned: others know of these.
    """
    written = tracer.aliases.written.difference(map(storage_of, passed))
    events = tracer.events[frame.start :]
    held = {id(h): h for e in events for h in (e.x_held, e.y_held) if h is not None}.values()
    ours: dict[int, list[Held]] = {}
    for one in held:
        if one.tensor is not None and not one.copied and storage_of(one.tensor) in written:
            ours.setdefault(storage_of(one.tensor), []).append(one)
    for alike in ours.values():
        tensor = alike[0].tensor
        if tensor is not None and not _saved(alike) and storage_users(tensor) > len(alike):
            for one in alike:
                one.snapshot()


def _saved(held: list[Held]) -> bool:
    """Whether autograd may have a part in the memory: there a write is noticed by its version."""
    return torch.is_grad_enabled() and not any(
        h.tensor is not None and h.tensor.is_inference() for h in held
    )


def _sharded(event: Event) -> bool:
    """Whether a map of it is a wrapper, of whose writes a tap would see one half."""
    return any(e.held is not None and is_wrapped(e.held.tensor) for _, e in event.entries)
