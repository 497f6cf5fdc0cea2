"""Hold, at each step of a pass that is followed, what was held at that step before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fmapkit._gradients import NO_GRAPH, in_function
from fmapkit._nested import tensors_in
from fmapkit._script import Making, Step
from fmapkit._store import Entry, Held
from fmapkit._transforms import transformed, transforming

if TYPE_CHECKING:
    from fmapkit._trace import Tracer

__all__ = ["FollowedMaps"]


class FollowedMaps:
    """The maps of a pass that is followed.

    Args:
        tracer: of the pass.

    Attributes:
        entries: each map that a step has made, in order.
    """

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self.entries: list[Entry] = []
        self._segments = tracer.current.segments
        self._drop_old = tracer.current.drop

    def before(self, step: Step, args: Any, kwargs: Any) -> list[Held | None] | None:
        """Hold what the maps of a call need of its arguments; None where that cannot be."""
        tracer = self._tracer
        operands = tensors_in(*args, kwargs)
        if transforming() is not None and any(map(transformed, operands)):
            return None
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

    def made(self, step: Step, held: list[Held | None], out: Any) -> None:
        """The maps of a step, of which some tensors are held already."""
        aliases = self._tracer.aliases
        with torch._C.DisableTorchFunction():
            for making, one in zip(step.makings, held, strict=True):
                if one is None:
                    whole = isinstance(out, Tensor)
                    one = aliases.reference(out if whole else tensors_in(out)[-1 - making.source])
                self.hold(making, one)

    def hold(self, making: Making, held: Held) -> None:
        """One map, of a tensor that is held."""
        if making.picked is not None:
            assert making.axes is not None
            held = self._tracer.record.taken(held, making.axes, making.picked)
        held.wanted = True
        record = self._tracer.record
        if record.graph and in_function():
            record.miss(making.origin.name, NO_GRAPH)
        self.add(
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

    def add(self, entry: Entry) -> None:
        """One more."""
        self.entries.append(entry)
        self._segments.append(entry)
        self._drop_old(None)

    def drop(self, step: Step) -> None:
        """Maps that turn out, at a step, not to be what they were taken for."""
        for place in step.dropped:
            self.entries[place].held = None
