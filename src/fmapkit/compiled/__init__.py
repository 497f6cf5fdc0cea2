"""Passes of what `torch.compile` has compiled: graphs that return their maps.

    entries.py       at each compiled module: who captures this call?
    variant.py       the module compiled once more, with instrumented graphs
      graph.py         run on fake tensors under the tracer: which maps, of which layer
      graph_edit.py    they become outputs
      graph_in_use.py  in use: which labels its maps have this time
    run.py           a pass: its maps are labelled and kept

Torch's tracing tools are imported once something compiled is captured, and not before.
"""

from fmapkit.compiled.entries import CompiledEntries as CompiledEntries
from fmapkit.compiled.run import GraphMapSink as GraphMapSink
