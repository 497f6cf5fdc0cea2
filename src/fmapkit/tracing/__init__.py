"""Watch a pass op by op: which layer and which nonlinearity ran, and what is overwritten.

Tracer                  tracer.py        each function: a σ, a layer, or any other
  PassTrace             pass_trace.py    where the pass is: what all below share
  a layer               layer_calls.py   whose weight it is, and where its filters lie
  σ as a function       sigma_calls.py   before it runs, and after
  a module's call       module_calls.py  what it turns out to have been, when it ends
    weightless modules  candidates.py    one σ, written out by hand?
  attention             attention.py     which softmax weighs values
  edits                 layer_edits.py, module_edits.py
  Record                record.py        events, hook points (events.py), map records
"""

from fmapkit.tracing.events import Event, HookPoint
from fmapkit.tracing.frames import Frame, call_frame, on_stack, running_modules
from fmapkit.tracing.label_table import LabelTable
from fmapkit.tracing.pass_trace import PassTrace
from fmapkit.tracing.record import Record
from fmapkit.tracing.tracer import Tracer

__all__ = [
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
