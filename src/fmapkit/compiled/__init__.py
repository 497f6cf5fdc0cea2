"""Passes of what `torch.compile` has compiled: graphs that return their maps.

Torch's tracing tools are imported once something compiled is captured, and not before.
"""

from fmapkit.compiled.entries import CompiledEntries as CompiledEntries
from fmapkit.compiled.run import GraphMapSink as GraphMapSink
