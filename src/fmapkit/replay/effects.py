"""What a piece of a pass means to the rest of it: a call of a region, or a run of a compiled graph.

A piece speaks of origins by `Ref`, since it may happen at different places of a pass: an origin
inside is "the n-th call of layer L from here", one that came in is "whatever the i-th input
carries". `Relations` makes that out of a trace, `Effects` keeps it, and tells the record of a
later pass; `PassPiece` says which origins are meant there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fmapkit.model import Names
from fmapkit.provenance import (
    NOWHERE,
    ChannelLabel,
    ChannelLayout,
    Label,
    Made,
    Origin,
    ParamLabel,
    ParamLabelRef,
)
from fmapkit.storage import MapRecord
from fmapkit.torchlib.memory import storage_of
from fmapkit.tracing import Event, Record


@dataclass(frozen=True, slots=True)
class Ref:
    """An origin, relative to a piece of a pass."""

    kind: str  # of the origin, or "input"
    name: str = ""  # the layer's label; empty for an input
    # Which call of it, counted from the start of the piece; for an input, which tensor.
    offset: int = 0
    claimed: bool = True  # a nonlinearity inside has received it
    # What a layer made its filters of.
    made: Made | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class ChannelLabelRef:
    """A label of channels that a piece returns: whose filters, by place, and how they lie."""

    ref: Ref | None  # their origin; None where they are nobody's
    axes: ChannelLayout | None  # along which they lie


# What a tensor carries whenever the piece happens; in one pass it is a `Label`.
PlaceLabel = ChannelLabelRef | ParamLabelRef | None


@dataclass(frozen=True, slots=True)
class SiteMap:
    """A map at a site of a piece; the record of it is made whenever the piece happens."""

    kind: str
    ref: Ref  # its origin
    axes: ChannelLayout | None  # along which its filters lie
    sigma: str | None  # the nonlinearity; None where there is none
    path: str  # into a nested output
    picked: tuple[int, ...] | None  # the filters that are held; None for all
    pending: bool  # a preactivation only if no nonlinearity outside claims it


@dataclass(frozen=True, slots=True)
class Effects:
    """What a piece of a pass means to the rest of it."""

    calls: tuple[tuple[str, int], ...]  # how often each layer is called
    outputs: tuple[tuple[str, PlaceLabel], ...]  # what each tensor that it returns carries, by path
    writes: tuple[int, ...]  # which inputs are written to
    rewritten: tuple[tuple[int, PlaceLabel], ...]  # what some of these carry afterwards
    claims: tuple[int, ...]  # which inputs reach a nonlinearity inside

    def base(self, record: Record) -> dict[str, int]:
        """How many calls there have been of the layers that are called."""
        return {name: record.counts[name] for name, _ in self.calls}

    def before(self, record: Record, inputs: Sequence[Any]) -> None:
        """The piece begins: what is held of that which it writes to is copied."""
        for index in self.writes:
            record.aliases.before_write(inputs[index])

    def apply(
        self, record: Record, maps: Iterable[tuple[MapRecord, SiteMap]], carried: Sequence[Label]
    ) -> None:
        """The piece has happened where no tracer saw it: tell what one would have seen."""
        segments, stop, aliases = record.current.segments, record.stop, record.aliases
        latest = None
        for entry, spec in maps:
            segments.append(entry)
            if stop is not None:
                stop.saw(entry)
            held = entry.held
            if held is not None and held is not latest:  # two maps of a site may share it
                aliases.watch(held)
                latest = held
            if spec.pending:
                record.pending.setdefault(id(entry.origin), []).append(entry)
        counts = record.counts
        for name, count in self.calls:
            counts[name] += count
        for index in self.claims:
            label = carried[index]
            if isinstance(label, ChannelLabel):
                record.claim(label.origin)


class PassPiece:
    """A piece of a pass, by its effects: which origins are meant in this pass."""

    __slots__ = ()

    inputs: list[Label]  # what came in carries; empty where nothing around it is known
    base: dict[str, int] | None  # how many calls of each layer there were before; None for none
    _origins: dict[Ref, Origin]

    def origin(self, ref: Ref) -> Origin:
        """The origin that is meant."""
        if ref.kind == "input":
            label = self.inputs[ref.offset] if self.inputs else None
            return label.origin if isinstance(label, ChannelLabel) else NOWHERE
        found = self._origins.get(ref)
        if found is None:
            key = f"{ref.name}()" if ref.kind == "output" else ref.name
            base = self.base.get(key, 0) if self.base is not None else 0
            found = self._origins[ref] = Origin(ref.kind, ref.name, base + ref.offset, ref.made)
            found.claimed = ref.claimed
        return found

    def label(self, label: PlaceLabel) -> Label:
        """What a tensor that it returns carries."""
        if isinstance(label, ChannelLabelRef):
            return ChannelLabel(
                self.origin(label.ref) if label.ref is not None else NOWHERE, label.axes
            )
        return label.weight(self.inputs) if label is not None else None


class Relations:
    """How a piece that was traced relates to the rest of the pass."""

    def __init__(
        self,
        names: Names,
        inputs: Sequence[Label],
        returned: Sequence[tuple[str, Label]],
        base: Mapping[str, int],
        rewritten: Sequence[tuple[int, Label]] = (),
    ) -> None:
        self._names = names
        self._inputs = inputs  # what came in carried
        self._returned = returned  # what it returns carries, by path
        self._base = base  # how many calls of each layer there were before
        self._rewritten = rewritten  # what inputs carry that it wrote other filters into, by place
        labels = (label for _, label in (*returned, *rewritten))
        self._escaping = {id(t.origin) for t in labels if isinstance(t, ChannelLabel)}
        self._outside: dict[int, Ref] = {}
        for index, label in enumerate(inputs):
            if isinstance(label, ChannelLabel) and label.origin is not NOWHERE:
                self._outside.setdefault(id(label.origin), Ref("input", "", index))
        self._known = dict(self._outside)

    def ref(self, origin: Origin) -> Ref:
        """An origin, by its place."""
        found = self._known.get(id(origin))
        if found is None:
            base = self._base.get(f"{origin.name}()" if origin.kind == "output" else origin.name, 0)
            offset = origin.call - base
            found = Ref(origin.kind, origin.name, offset, origin.claimed, origin.made)
            self._known[id(origin)] = found
        return found

    def made(self) -> list[Made | None]:
        """What the layers of the piece made their filters of."""
        return [ref.made for ref in self._known.values()]

    def pending(self, entry: MapRecord, event: Event) -> bool:
        """Whether a map is a preactivation only if no nonlinearity outside claims it."""
        layer = entry.kind == "preactivation" and event.kind == "layer"
        return layer and id(entry.origin) in self._escaping

    def effects(
        self, record: Record, events: Iterable[Event], arguments: Sequence[Any], writes: int = 0
    ) -> Effects:
        """What the piece means to the rest of a pass, which had so many `writes` before it."""
        base, written = self._base, record.aliases.written_since(writes)
        received = {id(e.origin) for e in events if e.kind == "sigma"}
        counts = record.counts.items()
        return Effects(
            calls=tuple((n, c - base.get(n, 0)) for n, c in counts if c > base.get(n, 0)),
            outputs=tuple((path, self._by_place(label)) for path, label in self._returned),
            writes=tuple(
                i
                for i, t in enumerate(arguments)
                if isinstance(t, Tensor) and storage_of(t) in written
            ),
            rewritten=tuple((index, self._by_place(label)) for index, label in self._rewritten),
            claims=tuple(sorted(r.offset for i, r in self._outside.items() if i in received)),
        )

    def _by_place(self, label: Label) -> PlaceLabel:
        if isinstance(label, ChannelLabel):
            known = label.origin is not NOWHERE
            return ChannelLabelRef(self.ref(label.origin) if known else None, label.axes)
        if label is None:
            return None
        for place, given in enumerate(self._inputs):
            if isinstance(given, ParamLabel) and given.parameter is label.parameter:
                return ParamLabelRef(given=place)
        owners = self._names.owners(label.parameter)
        return ParamLabelRef(-1, *owners[0], label.axes) if owners else None
