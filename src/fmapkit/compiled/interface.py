"""What compiled code needs of a capture whose pass it is, or a part of one."""

from __future__ import annotations

from typing import Protocol

from torch import nn

from fmapkit.model import Names
from fmapkit.selection import Selection
from fmapkit.storage import Pass
from fmapkit.tracing import LabelTable, Tracer


class CompiledCapture(Protocol):
    """A capture, as its compiled code knows it."""

    @property
    def model(self) -> nn.Module:
        """The captured model."""

    @property
    def names(self) -> Names:
        """Of the model's modules."""

    @property
    def wants(self) -> Selection:
        """Which maps to hold, and how."""

    @property
    def structure(self) -> object:
        """Another object once the model has other modules than it had."""

    def miss(self, layer: str, why: str) -> None:
        """Name what ran and was not captured."""


class TracedPass(Protocol):
    """What is under way in a capture, of which compiled code is a part."""

    current: Pass | None
    tracer: Tracer | None
    tags: LabelTable | None

    def traced(self) -> Tracer | None:
        """The tracer, made now if there is none yet; None where nothing is traced."""
