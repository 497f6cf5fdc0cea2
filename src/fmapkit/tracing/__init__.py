"""Watch a pass op by op: which layer and which nonlinearity ran, and what is overwritten."""

from fmapkit.tracing.attention import NONE_SEEN
from fmapkit.tracing.events import Event, HookPoint
from fmapkit.tracing.frames import Frame, call_frame, on_stack, running_modules
from fmapkit.tracing.label_table import LabelTable
from fmapkit.tracing.pass_trace import PassTrace
from fmapkit.tracing.record import Record
from fmapkit.tracing.tracer import Tracer

__all__ = [
    "NONE_SEEN",
    "Event",
    "Frame",
    "HookPoint",
    "LabelTable",
    "PassTrace",
    "Record",
    "Tracer",
    "call_frame",
    "on_stack",
    "running_modules",
]
