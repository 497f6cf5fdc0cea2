"""Learn: the first call of a kind that a unit gets runs under the tracer, and leaves a plan.

What the tracer sees is a matter of `_trace.py`, what a plan is, of `_plan.py`. The end of a pass
that was traced, or a part of it, is here, too.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from fmapkit._asked import Asked
from fmapkit._events import Event
from fmapkit._live import Lesson, Live
from fmapkit._missed import Misses
from fmapkit._nested import tensors_in
from fmapkit._placing import Placing
from fmapkit._plan import make_plan
from fmapkit._sharded import is_wrapped
from fmapkit._trace import Tracer
from fmapkit._units import Units

__all__ = ["Learning"]


class Learning:
    """Learns units.

    Args:
        asked: by the capture.
        live: what is under way.
        misses: of the capture.
        units: of the model.
        placing: of its hooks.
    """

    def __init__(
        self, asked: Asked, live: Live, misses: Misses, units: Units, placing: Placing
    ) -> None:
        self._model = asked.model
        self._names = asked.names
        self._live = live
        self._misses = misses
        self._units = units
        self._placing = placing

    def enter(self, module: nn.Module, key: Any, args: Any, kwargs: Any, inputs: list[Any]) -> Any:
        """A call of a unit begins that there is no plan for.

        Args:
            module: the unit.
            key: the kind of call; None if it can be replayed never.
            args: its positional arguments.
            kwargs: its keyword arguments.
            inputs: what its tensors carry; empty where nothing around it is traced.

        Returns:
            The arguments that it is to get instead; None for its own.
        """
        self._placing.no_taps()
        tracer = self._live.tracer
        if tracer is None:
            tracer = self._live.new_tracer()
            tracer.enter_inputs(args, kwargs)
        self._placing.in_lesson(module)
        if tracer.noter is not None:
            tracer.noter.stop()
        tracer.trial += 1
        tracer.aliases.written.clear()
        tracer.born.clear()
        tracer.edited = False
        frame = tracer.enter(module, args, kwargs)
        frame.counts = Counter(tracer.counts)
        self._live.lesson = Lesson(module, frame, key, inputs)
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
        tracer.trial -= 1
        self._live.lesson = None
        self._placing.after_lesson(module)
        if tracer.edited:  # from its next call on, only the parts below that need it are traced
            self._units.open(module)
            self._placing.scopes_changed()
            self._placing.on_scopes()
        elif not failed and tracer.failed is None:
            events = tracer.events[frame.start :]
            _check_held(events)
            final = output if replaced is None else replaced
            arguments = tensors_in(*frame.args, frame.kwargs)
            plan = make_plan(tracer, frame, final, lesson.inputs, arguments)
            if not any(map(_sharded, events)):
                self._units.of(module).learned(lesson.key, plan)
                self._placing.taps(module, plan)
            tracer.let_go(events)
        return replaced

    def finish(self, tracer: Tracer) -> None:
        """The traced pass has ended."""
        self._live.trace_out()
        _check_held(tracer.events)
        for module in tracer.unhooked:
            self._misses.add(
                self._names.of(module),
                "it was called on its own, so far only as a part of another module: in "
                "this pass it was seen by the functions it called, later on as a module",
            )
            self._units.direct.update(self._model.modules())
            self._placing.scopes_changed()
        tracer.end()

    def drop(self) -> None:
        """The pass has broken off, perhaps in the middle of a lesson."""
        live = self._live
        if live.lesson is not None:
            module, live.lesson = live.lesson.module, None
            self._placing.after_lesson(module)
        live.trace_out()
        if live.tracer is not None:
            live.tracer.end()


def _check_held(events: list[Event]) -> None:
    """Notice writes, to what is held of what ran, that nobody announced."""
    for event in events:
        for held in (event.x_held, event.y_held):
            if held is not None:
                held.check()


def _sharded(event: Event) -> bool:
    """Whether a map of it is a wrapper, of whose writes a tap would see one half."""
    return any(e.held is not None and is_wrapped(e.held.tensor) for _, e in event.entries)
