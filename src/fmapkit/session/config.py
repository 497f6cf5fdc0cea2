"""What one capture was asked for, checked: what every stage of it reads, and none writes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fmapkit.checking import FiniteCheck
from fmapkit.editing import RequestedEdits
from fmapkit.model import Names
from fmapkit.selection import EarlyStop, Selection
from fmapkit.session.analyses import Analyses


@dataclass(frozen=True, slots=True)
class CaptureConfig:
    """What one capture was asked for."""

    model: nn.Module  # to be captured
    names: Names  # of its modules
    wants: Selection  # which maps to hold, and how
    edits: RequestedEdits  # what to change while the model runs
    analyses: Analyses  # who sees each map
    stop: EarlyStop | None = None  # ends a pass early; None where none is to be ended
    methods: tuple[str, ...] = ()  # whose calls are passes, too
    # Looks at every map of a pass; None where none is to be looked at.
    check: FiniteCheck | None = None
