"""One `with` block: when a pass begins and ends, who answers a module's call, what is missed."""

from fmapkit.session.analyses import Analyses
from fmapkit.session.config import CaptureConfig
from fmapkit.session.protocol import Analysis
from fmapkit.session.session import Rest, Session

__all__ = [
    "Analyses",
    "Analysis",
    "CaptureConfig",
    "Rest",
    "Session",
]
