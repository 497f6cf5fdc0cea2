"""Make a plan of one traced call of a region."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fmapkit.model import Names
from fmapkit.provenance import NOWHERE, ChannelLabel, Label, Origin, ParamLabel, ParamLabelRef
from fmapkit.replay.plan import ChannelLabelRef, PlaceTag, Plan, Ref
from fmapkit.replay.steps import Reading, mark_shared
from fmapkit.torchlib.memory import storage_of
from fmapkit.torchlib.nested import leaves
from fmapkit.tracing import Event, Frame, Tracer

__all__ = ["make_plan"]


def make_plan(
    tracer: Tracer, frame: Frame, output: Any, inputs: Sequence[Label], arguments: Sequence[Tensor]
) -> Plan:
    """Boil down what the tracer saw of one call.

    Args:
        tracer: which has just seen the call end.
        frame: of the call.
        output: what it returned.
        inputs: what its tensor arguments carried.
        arguments: its tensor arguments.
    """
    trace, record = tracer.trace, tracer.trace.record
    events, before = record.events[frame.start :], frame.counts
    refs = _Refs(inputs, before, trace.names)
    returned = [(path, trace.labels.of(t)) for path, t in leaves(output)]
    escaping = {id(t.origin) for _, t in returned if isinstance(t, ChannelLabel)}
    firings, retention = record.firings[frame.firing :], trace.wants.retention
    mark_shared(events, bool(retention))
    read = Reading(firings, refs.of, escaping, retention, frame.position)
    keeping = read.keeping()
    return Plan(
        steps=tuple(read.steps),
        order=read.order,
        at=read.at,
        spare=frozenset(range(len(read.order))).difference(s.at for s in read.steps),
        taps=frozenset(read.tapped),
        direct=read.direct,
        sites=read.sites,
        scopes=frozenset(read.scopes),
        toggles=read.toggles(firings),
        before=read.before() - keeping,
        keeping=keeping,
        keeps=any(s.keeps for s in read.steps),
        shares=any(s.shared for s in read.steps),
        calls=tuple((n, c - before[n]) for n, c in record.counts.items() if c > before[n]),
        outputs=tuple((path, refs.label(tag)) for path, tag in returned),
        writes=tuple(i for i, t in enumerate(arguments) if storage_of(t) in record.aliases.written),
        claims=refs.claimed(events),
        graph=any(e.graph for e in events),
        joins=any(e.joins for e in events),
    )


class _Refs:
    """The origins that a call speaks of, by place.

    Args:
        inputs: what its tensor arguments carried.
        counts: how many calls of each layer there had been when it began.
        names: of the model's modules.
    """

    def __init__(self, inputs: Sequence[Label], counts: Mapping[str, int], names: Names) -> None:
        self._inputs = inputs
        self._counts = counts
        self._names = names
        self._entered: dict[int, int] = {}  # by origin: the first input that carried it
        for index, tag in enumerate(inputs):
            if isinstance(tag, ChannelLabel) and tag.origin is not NOWHERE:
                self._entered.setdefault(id(tag.origin), index)
        self._known = {origin: Ref("input", "", at) for origin, at in self._entered.items()}

    def of(self, origin: Origin) -> Ref:
        """An origin, relative to the call."""
        found = self._known.get(id(origin))
        if found is None:
            base = self._counts[f"{origin.name}()" if origin.kind == "output" else origin.name]
            call = origin.call - base
            found = Ref(origin.kind, origin.name, call, origin.claimed, origin.made)
            self._known[id(origin)] = found
        return found

    def label(self, tag: Label) -> PlaceTag:
        """What a tensor of its output carries, in any such call."""
        if isinstance(tag, ChannelLabel):
            origin = self.of(tag.origin) if tag.origin is not NOWHERE else None
            return ChannelLabelRef(origin, tag.axes)
        if tag is None:
            return None
        for place, given in enumerate(self._inputs):
            if isinstance(given, ParamLabel) and given.parameter is tag.parameter:
                return ParamLabelRef(given=place)
        owners = self._names.owners(tag.parameter)
        return ParamLabelRef(-1, *owners[0], tag.axes) if owners else None

    def claimed(self, events: Sequence[Event]) -> tuple[int, ...]:
        """Which inputs reach a nonlinearity inside."""
        reached = {id(event.origin) for event in events if event.kind == "sigma"}
        return tuple(sorted(at for origin, at in self._entered.items() if origin in reached))
