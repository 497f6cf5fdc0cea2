"""What a traced pass shows: what ran and has maps, and the moments at which a tap would see it.

Data, and the order of the moments. Plans are made of these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from types import FrameType
from typing import Any

from torch import nn

from fmapkit.provenance import NOWHERE, ChannelLayout, Origin
from fmapkit.storage import MapRecord, StoredTensor


@dataclass(slots=True, eq=False)
class Event:
    """Something that ran and has maps: a nonlinearity, a layer, an output, or attention."""

    kind: str  # "sigma", "layer", "output" or "attention"
    scope: nn.Module  # the module in whose own forward it ran
    function: Any = None  # that ran; None for a module's call
    _: KW_ONLY
    module: nn.Module | None = None  # whose call it is, if it is one; that may turn out later
    key: str | None = None  # the keyword under which that module got x
    place: int = 0  # which of a function's tensor arguments x is
    sigma: str | None = None  # of a nonlinearity, its name
    # Where it is what the running module was given: until its call ends, to see whether that call
    # is this event.
    x: Any = None
    y: Any = None  # likewise, what it gave
    in_place: bool = False  # it has overwritten x
    kept: bool = False  # it is in place, and z kept its memory
    origin: Origin = NOWHERE
    axes: ChannelLayout | None = None
    x_held: StoredTensor | None = None
    y_held: StoredTensor | None = None
    shared: bool = False  # other maps lie in what it has overwritten, too
    graph: bool = False  # its result is part of an autograd graph
    joins: bool = False  # its result may become part of one
    hook_point: HookPoint | None = None
    # The maps: ("x" | "y" | path, what is held).
    entries: list[tuple[str, MapRecord]] = field(init=False)

    def __post_init__(self) -> None:
        self.entries = []

    def held(self, slot: str) -> StoredTensor | None:
        """What is held of x, or of what the call gave."""
        return self.x_held if slot == "x" else self.y_held

    def forget(self) -> None:
        """The call that it ran in has ended: it is none, or known to be one."""
        self.x = self.y = None

    def end(self) -> None:
        """Let go of all that could keep a tensor or a graph alive."""
        self.forget()
        self.x_held = self.y_held = self.hook_point = None
        self.entries.clear()

    def drop(self) -> None:
        """The event turned out to be part of another one."""
        if self.hook_point is not None and self in self.hook_point.events:
            self.hook_point.events.remove(self)
        for _, entry in self.entries:
            entry.held = None
        self.entries.clear()
        self.forget()


@dataclass(slots=True, eq=False)
class HookPoint:
    """A moment at which a tap would fire: a module's call ends, or a function's."""

    module: nn.Module | None
    scope: nn.Module
    function: Any = None
    parent: nn.Module | None = None  # the module that called the module
    position: int = 0  # how many decisions of the pass had been taken
    site: str | None = None  # where in the source the function was called, if that is told
    events: list[Event] = field(init=False)

    def __post_init__(self) -> None:
        self.events = []


@dataclass(frozen=True, slots=True, eq=False)
class FusedCall:
    """A call of a module whose fused kernel has shown all of its maps."""

    module: nn.Module  # of torch's
    start: int  # the first of its hook points
    end: int  # the last one, and one more
    names: Mapping[int, str]  # which of the kernel's maps is held, by the `id` of what is held


class HookPoints(list[HookPoint]):
    """Every moment of a pass at which a tap would fire, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.clock: Callable[[], int] = int  # how many decisions have been taken
        # Where a function was called that is under way; None while nobody is to know.
        self.site_of: Callable[[FrameType, Any], str | None] | None = None
        self.asking: list[FrameType] = []  # who has called it

    def append(self, hook_point: HookPoint) -> None:
        """One more moment, now."""
        hook_point.position = self.clock()
        if hook_point.module is None and self.site_of is not None and self.asking:
            hook_point.site = self.site_of(self.asking[-1], hook_point.function)
        super().append(hook_point)

    def fire(self, event: Event) -> None:
        """A tap of this event would fire: now, unless the end of a module is such a moment."""
        if event.module is None:
            hook_point = HookPoint(None, event.scope, event.function)
            self.append(hook_point)
        else:
            hook_point = self[-1]
        hook_point.events.append(event)
        event.hook_point = hook_point

    def refire(self, event: Event) -> None:
        """The event turned out to be a module's call, which is just ending."""
        if event.hook_point is not None:
            event.hook_point.events.remove(event)
        self.fire(event)
