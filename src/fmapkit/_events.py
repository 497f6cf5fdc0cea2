"""What a traced pass shows: what ran and has maps, and the moments at which a tap would see it.

Data, and the order of the moments. Plans are made of these.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fmapkit._axes import Axes
from fmapkit._origin import NOWHERE, Origin
from fmapkit._store import Entry, Held, version_of

__all__ = ["Doings", "Event", "Firing", "Firings"]

# How many firings back the operand of a function is looked for.
_NEAR = 32


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
        *("delta", "kept", "shared", "sink", "source"),
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
        self.axes: Axes | None = None
        self.x: Any = None  # until the frame ends, to see whether a module's call is this event
        self.y: Any = None
        self.x_held: Held | None = None
        self.y_held: Held | None = None
        self.kept = False  # it is in place, and z kept its memory
        self.shared = False  # in which other maps lie, too
        self.in_place = False
        self.graph = False  # its result is part of an autograd graph
        self.joins = False  # its result may become part of one
        self.firing: Firing | None = None
        # Of a function's x and y: the hooks that would see them, and how often x is written to
        # between the first and the function.
        self.source: Firing | None = None
        self.sink: Firing | None = None
        self.delta = 0
        self.entries: list[tuple[str, Entry]] = []  # ("x" | "y" | path, what is held)

    def drop(self) -> None:
        """The event turned out to be part of another one."""
        if self.firing is not None and self in self.firing.events:
            self.firing.events.remove(self)
        for _, entry in self.entries:
            entry.held = None
        self.entries.clear()
        self.x = self.y = None


class Firing:
    """A moment at which a tap would fire: a module's call begins or ends, or a function's ends."""

    __slots__ = (
        *("before", "events", "function", "module", "parent", "position", "scope", "tensor"),
        "version",
    )

    def __init__(
        self,
        module: nn.Module | None,
        scope: nn.Module,
        function: Any,
        parent: nn.Module | None,
        tensor: Any = None,
        before: bool = False,
    ) -> None:
        self.module = module
        self.scope = scope
        self.function = function
        self.parent = parent  # the module that called the module
        self.before = before
        self.position = 0  # how many decisions of the pass had been taken
        self.events: list[Event] = []
        # What the tap would see: the first argument, or the output.
        self.tensor: weakref.ref[Tensor] | None = None
        self.version = 0
        if isinstance(tensor, Tensor):
            self.tensor = weakref.ref(tensor)
            self.version = version_of(tensor)


class Firings(list[Firing]):
    """Every moment of a pass at which a tap would fire, in order."""

    __slots__ = ("_awaited", "clock")

    def __init__(self) -> None:
        super().__init__()
        self.clock: Callable[[], int] = int  # how many decisions have been taken
        self._awaited: dict[int, tuple[weakref.ref[Tensor], int, Event]] = {}

    def append(self, firing: Firing) -> None:
        """One more moment, now."""
        firing.position = self.clock()
        super().append(firing)

    def fire(self, event: Event) -> None:
        """A tap of this event would fire: now, unless the end of a module is such a moment."""
        if event.module is None:
            firing = Firing(None, event.scope, event.function, None)
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

    def passes(self, firing: Firing, tensor: Any) -> None:
        """A module's tap would fire; it may be the one that sees the result of a function."""
        self.append(firing)
        found = self._awaited.pop(id(tensor), None) if self._awaited else None
        if found is not None and found[0]() is tensor and firing.version == found[1]:
            found[2].sink = firing

    def between(self, event: Event, z: Tensor, a: Tensor) -> None:
        """A function between two modules: hooks on these would see its operand and its result."""
        for firing in reversed(self[-_NEAR:]):
            if firing.tensor is not None and firing.tensor() is z:
                event.source = firing
                event.delta = version_of(z) - firing.version
                self._awaited[id(a)] = (weakref.ref(a), version_of(a), event)
                return

    def end(self) -> None:
        """Let go of everything."""
        self.clear()
        self._awaited.clear()


@dataclass(slots=True)
class Doings:
    """What the record of a pass did since it was last asked.

    Attributes:
        made: maps, with their slot, and what was held of the model's own tensor.
        dropped: maps that turned out not to be what they were taken for.
        claimed: origins that a nonlinearity has received.
        counted: layers that were called.
        whole: the module that has just ended is one nonlinearity, or one layer.
    """

    made: list[tuple[str, Entry, Held]] = field(default_factory=list)
    dropped: list[Entry] = field(default_factory=list)
    claimed: list[Origin] = field(default_factory=list)
    counted: list[str] = field(default_factory=list)
    whole: bool = False

    def any(self) -> bool:
        """Whether it did anything."""
        return bool(self.made or self.dropped or self.claimed or self.counted or self.whole)

    def clear(self) -> None:
        """It was asked."""
        self.made.clear()
        self.dropped.clear()
        self.claimed.clear()
        self.counted.clear()
        self.whole = False
