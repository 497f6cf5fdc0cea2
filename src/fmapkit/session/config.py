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
    """What one capture was asked for.

    Attributes:
        model: to be captured.
        names: of its modules.
        wants: which maps to hold, and how.
        edits: what to change while the model runs.
        analyses: who sees each map.
        stop: ends a pass early; None where none is to be ended.
        methods: whose calls are passes, too.
        check: looks at every map of a pass; None where none is to be looked at.
    """

    model: nn.Module
    names: Names
    wants: Selection
    edits: RequestedEdits
    analyses: Analyses
    stop: EarlyStop | None = None
    methods: tuple[str, ...] = ()
    check: FiniteCheck | None = None
