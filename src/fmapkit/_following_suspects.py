"""Modules that may be one nonlinearity, in a pass that is followed.

Whether such a module is one is known from the script. What the tracer would have to know of it,
should it take over here, is kept up to date: how the tensors inside depend on its input, and which
nonlinearities it has called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from fmapkit._degrees import Degrees
from fmapkit._events import Event
from fmapkit._following_maps import FollowedMaps
from fmapkit._frames import Frame
from fmapkit._nested import tensors_in
from fmapkit._origin import Lookup
from fmapkit._script import Step

if TYPE_CHECKING:
    from fmapkit._trace import Tracer

__all__ = ["FollowedSuspects"]


class FollowedSuspects:
    """Those that are running.

    Args:
        tracer: of the pass.
        maps: of the pass.

    Attributes:
        frames: of their calls, outermost first.
    """

    def __init__(self, tracer: Tracer, maps: FollowedMaps) -> None:
        self._tracer = tracer
        self._maps = maps
        self.frames: list[Frame] = []

    def sigma(self, step: Step, frame: Frame, args: Any, kwargs: Any, held: Any) -> Event | None:
        """A call is about to run; the tracer's event of it, if it is a nonlinearity."""
        if step.known.sigma is None or frame.kind == "sigma":
            return None
        z = tensors_in(*args, kwargs)[0]
        event = Event("sigma", frame.module, step.function)
        event.sigma = step.known.sigma
        event.in_place = step.known.in_place or step.known.asked_in_place(args, kwargs)
        event.x_held = held[0] if held else self._tracer.aliases.reference(z)
        if z is frame.x:
            event.x, event.key = z, frame.key
            frame.in_place = frame.in_place or event.in_place
        return event

    def ran(
        self,
        step: Step,
        inner: Frame,
        event: Event | None,
        args: Any,
        kwargs: Any,
        out: Any,
        tag: Lookup,
    ) -> None:
        """It has run."""
        known = step.known
        if known.sigma is not None:
            z = tensors_in(*args, kwargs)[0]
            if inner.kind == "sigma" and z is inner.x:
                inner.a = out
            for frame in self.frames:
                frame.step(known.name, (z,), {}, out, tag, nonlinear=True)
        else:
            for frame in self.frames:
                frame.step(known.name, args, kwargs, out, tag)
        if event is not None and isinstance(out, Tensor):
            event.y = out if event.x is not None else None
            event.y_held = self._tracer.aliases.reference(out)
            self._event(event, step)

    def _event(self, event: Event, step: Step) -> None:
        """The tracer's event of a step whose maps have just been held."""
        made = self._maps.entries[len(self._maps.entries) - len(step.makings) :]
        for making, entry in zip(step.makings, made, strict=True):
            if making.kind == "output":  # stays, whatever the module around it turns out to be
                continue
            event.origin = making.origin
            event.entries.append(("x" if making.source >= 0 else "y", entry))
        self._tracer.events.append(event)

    def open(self, step: Step, frame: Frame, tag: Lookup) -> None:
        """A module that may be one nonlinearity begins."""
        assert frame.x is not None
        frame.kind = step.scope
        frame.degrees = Degrees(frame.x) if step.scope == "candidate" else None
        frame.x_held = self._tracer.aliases.reference(frame.x)
        frame.tag = tag(frame.x)
        self.frames.append(frame)

    def close(self, step: Step, frame: Frame, output: Any) -> None:
        """It ends."""
        tracer = self._tracer
        self.frames.pop()
        if step.whole:
            del tracer.events[frame.start :]
        if not self.frames:
            tracer.events.clear()
        elif step.whole:  # one in another one
            event = Event("sigma", frame.module)
            event.module, event.key, event.sigma = frame.module, frame.key, step.scope
            event.x_held, event.y_held = frame.x_held, tracer.aliases.reference(output)
            self._event(event, step)
