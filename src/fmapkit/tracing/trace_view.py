"""What the stages of a session ask of a trace, at first hand, and what they tell it."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from fmapkit.provenance import Carried, Label, Origin
from fmapkit.storage import Aliases, MapRecord, Pass
from fmapkit.tracing.events import Event, HookPoints
from fmapkit.tracing.frames import Frame
from fmapkit.tracing.label_table import LabelTable
from fmapkit.tracing.pass_trace import PassTrace
from fmapkit.tracing.record import Record

__all__ = ["TraceView"]


class TraceView:
    """Reads and writes a `PassTrace`.

    Attributes:
        trace: of the pass.
    """

    trace: PassTrace

    @property
    def frames(self) -> list[Frame]:
        """The modules that are running, outermost first."""
        return self.trace.frames

    @property
    def tags(self) -> LabelTable:
        """What the tensors carry."""
        return self.trace.labels

    @property
    def record(self) -> Record:
        """What ran, and the maps held of it."""
        return self.trace.record

    @property
    def aliases(self) -> Aliases:
        """What is held of the tensors, and the memory that was written to."""
        return self.trace.record.aliases

    @property
    def events(self) -> list[Event]:
        """What ran and has maps."""
        return self.trace.record.events

    @property
    def firings(self) -> HookPoints:
        """Every moment at which a tap would fire."""
        return self.trace.record.firings

    @property
    def counts(self) -> Counter[str]:
        """How many calls there were of each layer, by its label."""
        return self.trace.record.counts

    @property
    def pending(self) -> dict[int, list[MapRecord]]:
        """Preactivations of replayed regions that a nonlinearity may still claim."""
        return self.trace.record.pending

    @property
    def current(self) -> Pass:
        """The pass, which gets the maps."""
        return self.trace.record.current

    @property
    def deciding(self) -> set[nn.Module]:
        """Modules to be traced in every pass."""
        return self.trace.deciding

    @property
    def unhooked(self) -> set[nn.Module]:
        """Modules that ran without hooks."""
        return self.trace.unhooked

    @property
    def moments(self) -> list[tuple[int, nn.Module | None]]:
        """After how many decisions modules began and ended."""
        return self.trace.moments

    @property
    def learning(self) -> int:
        """> 0 while a region is recorded."""
        return self.trace.learning

    @learning.setter
    def learning(self, value: int) -> None:
        self.trace.learning = value

    @property
    def paused(self) -> bool:
        """Nothing is to be seen."""
        return self.trace.paused

    @paused.setter
    def paused(self, value: bool) -> None:
        self.trace.paused = value

    @property
    def edited(self) -> bool:
        """Something was, or might have been, edited."""
        return self.trace.edited

    @edited.setter
    def edited(self, value: bool) -> None:
        self.trace.edited = value

    def tag(self, value: Any) -> Label:
        """What a tensor carries."""
        return self.trace.labels.of(value)

    def set_tag(self, value: Any, label: Carried) -> None:
        """What a tensor is to carry; nested like the value."""
        self.trace.labels.put(value, label)

    def enter_inputs(self, args: Any, kwargs: Any) -> None:
        """The pass begins."""
        self.trace.labels.enter(args, kwargs)

    def moved(self, before: Any, after: Any) -> None:
        """A hook of torch's redistributed tensors."""
        self.trace.labels.moved(before, after)

    def miss(self, layer: str, reason: str) -> None:
        """Something cannot be captured."""
        self.trace.record.miss(layer, reason)

    def claim(self, origin: Origin) -> None:
        """Filters have reached a nonlinearity."""
        self.trace.record.claim(origin)

    def let_go(self, events: list[Event]) -> None:
        """Let go of the tensors that no map holds."""
        self.trace.record.let_go(events)
