"""What a traced pass shows: what ran and has maps, and the moments at which a tap would see it.

Data, and the order of the moments. Plans are made of these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fmapkit.provenance import NOWHERE, ChannelLayout
from fmapkit.storage import MapRecord, StoredTensor

__all__ = ["Event", "HookPoint", "HookPoints"]


class Event:
    """Something that ran and has maps: a nonlinearity, a layer, or a wanted output."""

    __slots__ = (
        *(
            "axes",
            "entries",
            "function",
            "key",
            "kind",
            "module",
            "origin",
            "place",
            "scope",
        ),
        *("sigma", "x", "x_held", "y", "y_held", "in_place", "firing", "graph", "joins"),
        *("kept", "shared"),
    )

    def __init__(self, kind: str, scope: nn.Module, function: Any = None) -> None:
        self.kind = kind  # "sigma", "layer" or "output"
        self.scope = scope  # the module in whose own forward it ran
        self.function = function
        self.module: nn.Module | None = None  # the module whose call it is, if it is one
        self.key: str | None = None  # the keyword under which that module got x
        self.place = 0  # which of a function's tensor arguments x is
        self.origin = NOWHERE
        self.sigma: str | None = None
        self.axes: ChannelLayout | None = None
        self.x: Any = None  # until the frame ends, to see whether a module's call is this event
        self.y: Any = None
        self.x_held: StoredTensor | None = None
        self.y_held: StoredTensor | None = None
        self.kept = False  # it is in place, and z kept its memory
        self.shared = False  # in which other maps lie, too
        self.in_place = False
        self.graph = False  # its result is part of an autograd graph
        self.joins = False  # its result may become part of one
        self.firing: HookPoint | None = None
        self.entries: list[tuple[str, MapRecord]] = []  # ("x" | "y" | path, what is held)

    def drop(self) -> None:
        """The event turned out to be part of another one."""
        if self.firing is not None and self in self.firing.events:
            self.firing.events.remove(self)
        for _, entry in self.entries:
            entry.held = None
        self.entries.clear()
        self.x = self.y = None


class HookPoint:
    """A moment at which a tap would fire: a module's call ends, or a function's."""

    __slots__ = ("events", "function", "module", "parent", "position", "scope", "site")

    def __init__(
        self,
        module: nn.Module | None,
        scope: nn.Module,
        function: Any = None,
        parent: nn.Module | None = None,
    ) -> None:
        self.module = module
        self.scope = scope
        self.function = function
        self.parent = parent  # the module that called the module
        self.position = 0  # how many decisions of the pass had been taken
        self.site: str | None = None  # where in the source the function was called, if that is told
        self.events: list[Event] = []


class HookPoints(list[HookPoint]):
    """Every moment of a pass at which a tap would fire, in order.

    Attributes:
        clock: how many decisions have been taken.
        site_of: where a function was called that is under way; None while nobody is to know.
    """

    __slots__ = ("clock", "site_of")

    def __init__(self) -> None:
        super().__init__()
        self.clock: Callable[[], int] = int
        self.site_of: Callable[[Any], str | None] | None = None

    def append(self, firing: HookPoint) -> None:
        """One more moment, now."""
        firing.position = self.clock()
        if firing.module is None and self.site_of is not None:
            firing.site = self.site_of(firing.function)
        super().append(firing)

    def fire(self, event: Event) -> None:
        """A tap of this event would fire: now, unless the end of a module is such a moment."""
        if event.module is None:
            firing = HookPoint(None, event.scope, event.function)
            self.append(firing)
        else:
            firing = self[-1]
        firing.events.append(event)
        event.firing = firing

    def refire(self, event: Event) -> None:
        """The event turned out to be a module's call, which is just ending."""
        if event.firing is not None:
            event.firing.events.remove(event)
        self.fire(event)
