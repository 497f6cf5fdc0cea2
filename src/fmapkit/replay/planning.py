"""Make a plan of one traced call of a region."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fmapkit.provenance import Label, buffers_of, is_same
from fmapkit.replay.effects import Relations
from fmapkit.replay.plan import Plan
from fmapkit.replay.plan_steps import Reading, mark_shared
from fmapkit.torchlib.nested import leaves
from fmapkit.tracing import Frame, Tracer


def make_plan(
    tracer: Tracer,
    frame: Frame,
    output: Any,
    inputs: Sequence[Label],
    arguments: Sequence[Tensor],
    kept: Sequence[tuple[str, Tensor]] = (),
) -> Plan:
    """Boil down what the tracer saw of one call.

    Args:
        inputs: what its tensor arguments carried.
        arguments: its tensor arguments.
        kept: what it has left in attributes of modules, where the rest of the pass may read it.
    """
    trace, record = tracer.trace, tracer.trace.record
    events = record.events[frame.start :]
    returned = [(path, trace.labels.of(t)) for path, t in (*leaves(output), *kept)]
    after = [trace.labels.of(argument) for argument in arguments[: len(inputs)]]
    rewritten = [(n, t) for n, t in enumerate(after) if not is_same(t, inputs[n])]
    relations = Relations(trace.names, inputs, returned, frame.counts, rewritten)
    firings, retention = record.firings[frame.firing :], trace.wants.retention
    mark_shared(events, bool(retention))
    fused = [call for call in trace.fused if call.start >= frame.firing]
    read = Reading(firings, relations, retention, frame.position, fused, frame.firing)
    keeping = read.keeping()
    return Plan(
        steps=tuple(read.steps),
        order=read.order,
        at=read.at,
        spare=frozenset(range(len(read.order))).difference(s.at for s in read.steps),
        taps=frozenset(read.tapped),
        direct=read.direct,
        sites=read.sites,
        plain_sites=read.plain_sites,
        scopes=frozenset(read.scopes),
        toggles=read.toggles(firings),
        before=read.before() - keeping,
        keeping=keeping,
        fusing=read.fusing(firings),
        kernels=read.kernels,
        edited=frozenset(trace.names.by_name[name] for name, *_ in trace.placed),
        placed={
            place: (axes, changed, position - frame.position)
            for place, (axes, changed, position) in trace.placed.items()
        },
        keeps=any(s.keeps for s in read.steps),
        shares=any(s.shared for s in read.steps),
        effects=relations.effects(record, events, arguments, frame.writes),
        graph=any(e.graph for e in events),
        buffers=buffers_of(relations.made()),
        joins=any(e.joins for e in events),
    )
