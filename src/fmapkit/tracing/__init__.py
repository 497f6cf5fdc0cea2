"""Watch a pass op by op: which layer and which nonlinearity ran, and what is overwritten."""

from fmapkit.tracing.events import Event as Event
from fmapkit.tracing.events import FusedCall as FusedCall
from fmapkit.tracing.events import HookPoint as HookPoint
from fmapkit.tracing.frames import Frame as Frame
from fmapkit.tracing.frames import Place as Place
from fmapkit.tracing.frames import Placed as Placed
from fmapkit.tracing.frames import call_frame as call_frame
from fmapkit.tracing.frames import on_stack as on_stack
from fmapkit.tracing.frames import running_modules as running_modules
from fmapkit.tracing.input_reads import InputRead as InputRead
from fmapkit.tracing.input_reads import read as read
from fmapkit.tracing.label_table import LabelTable as LabelTable
from fmapkit.tracing.module_edits import PlacedEdits as PlacedEdits
from fmapkit.tracing.module_edits import goes_on_in as goes_on_in
from fmapkit.tracing.pass_trace import PassTrace as PassTrace
from fmapkit.tracing.record import Record as Record
from fmapkit.tracing.tracer import Tracer as Tracer
