"""One pass of compiled code: its graphs return their maps too, and a sink labels and keeps them.

What a graph's maps are is a matter of `compiled/graph_in_use.py`, which needs torch's tracing
tools. This file does without: a capture of a model that is not compiled imports none of them.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from fmapkit.instrumentation import Off
from fmapkit.model import Names
from fmapkit.provenance import STOP, ChannelLabel, Origin
from fmapkit.reasons import Reason
from fmapkit.replay import ChannelLabelRef, Effects, PassPiece, Ref, SiteMap
from fmapkit.selection import Selection
from fmapkit.storage import MapRecord, Pass, StoredTensor
from fmapkit.torchlib.memory import versions_of
from fmapkit.torchlib.nested import leaves
from fmapkit.tracing import LabelTable, Tracer, running_modules


class CompiledCapture(Protocol):
    """A capture that answers the calls of compiled modules, as their code knows it.

    `session/compiled_calls.py` has the one that there is, and says what each of these is.
    """

    @property
    def names(self) -> Names: ...
    @property
    def wants(self) -> Selection: ...
    @property
    def structure(self) -> object: ...
    @property
    def thread(self) -> int: ...
    @property
    def idle(self) -> bool: ...

    def miss(self, layer: str, why: str) -> None: ...
    def leave_alone(self, root: nn.Module) -> None: ...
    def without_hooks(self, module: nn.Module) -> Off: ...
    def begin_call(
        self, root: nn.Module, module: nn.Module, args: Any, kwargs: Any
    ) -> GraphMapSink | None: ...
    def skip(self, root: nn.Module) -> None: ...
    def unread(self, root: nn.Module, why: str) -> None: ...
    def fail(self, sink: GraphMapSink) -> None: ...
    def end_call(self, sink: GraphMapSink, output: Any) -> None: ...


class TracedPass(Protocol):
    """What is under way in a capture, of which compiled code is a part."""

    current: Pass | None
    tracer: Tracer | None
    labels: LabelTable | None

    def traced(self) -> Tracer | None:
        """The tracer, made now if there is none yet; None where nothing is traced."""


class Running(threading.local):
    """The sinks that the compiled code of this thread brings its maps to, by place."""

    sinks: Sequence[GraphMapSink] = ()
    stop: Any = None  # the code of the function below which compiled code runs
    root: nn.Module | None = None  # the compiled module

    def modules(self) -> list[nn.Module]:
        """Those whose calls are under way in compiled code, outermost first."""
        found = running_modules(self.stop)
        # Of the compiled one itself, it may be the forward that runs.
        return found if self.root is None or self.root in found else [self.root, *found]


running = Running()


@dataclass(frozen=True, slots=True)
class GraphMap(SiteMap):
    """One map of a compiled graph."""

    place: int  # of its tensor among the graph's outputs; from -1 downwards, among its inputs
    copied: bool


class Labels:
    """What a graph's maps are, given what its inputs carry."""

    def __init__(self, maps: Sequence[GraphMap], effects: Effects) -> None:
        self.maps = maps
        self.effects = effects
        keys = [(m.place, m.picked) for m in maps]
        first: dict[Any, GraphMap] = {}
        for key, m in zip(keys, maps, strict=True):
            first.setdefault(key, m)
        # The map that tells of each tensor to be held; maps may share one.
        self.sources = list(first.values())
        self.places = [m.place for m in self.sources]  # of these tensors, as in `GraphMap`
        self.slots = list(map(list(first).index, keys))  # of each map, which tensor it is
        # Of some map, only some filters are held.
        self.picking = any(m.picked is not None for m in self.sources)


class GraphRun(PassPiece):
    """The maps of one run of a compiled graph."""

    __slots__ = ("_copied", "_labels", "_origins", "_tensors", "_versions", "base", "inputs")

    def __init__(
        self, labels: Labels, tensors: list[Tensor], copied: list[bool] | None, carried: list[Any]
    ) -> None:
        self._labels = labels
        self._tensors = tensors  # what is held, by slot
        self._versions = versions_of(tensors)
        self._copied = copied  # which of them are copies; None for none
        self.inputs = carried  # what the graph's inputs carried
        self.base: dict[str, int] | None = None
        self._origins: dict[Ref, Origin] = {}

    @property
    def uncounted(self) -> bool:
        """Whether some tensor has no version counter."""
        return bool(self._tensors) and min(self._versions, default=0) < 0

    def entries(self) -> list[MapRecord]:
        if not self._tensors:
            return []
        copied = self._copied or [False] * len(self._tensors)
        shared: dict[int, StoredTensor] = {}  # inductor returns one tensor at several places
        held = []
        for tensor, version, copy, m in zip(
            self._tensors, self._versions, copied, self._labels.sources, strict=True
        ):
            if id(tensor) not in shared:
                shared[id(tensor)] = StoredTensor(tensor, version, m.copied or copy)
            held.append(shared[id(tensor)])
        return [
            MapRecord(m.kind, self.origin(m.ref), held[slot], m.axes, m.sigma, m.path, m.picked)
            for m, slot in zip(self._labels.maps, self._labels.slots, strict=True)
        ]

    def release(self) -> list[Any]:
        """Let go of every tensor; what holds them still."""
        tensors: list[Any] = self._tensors
        self._tensors = []
        self.inputs = []
        return tensors


class GraphMapSink:
    """Where the compiled graphs of one pass bring their maps."""

    def __init__(self, capture: CompiledCapture, live: TracedPass, alone: bool) -> None:
        assert live.current is not None
        self.capture = capture
        self.alone = alone  # compiled code is all that the pass runs
        self._live = live
        self._segments = live.current.segments
        self.runs = 0
        self.unread = 0  # graphs that could not be labelled, and are named already
        self.broken = False  # some graph was not the whole of what was compiled
        self._latest: tuple[Labels, GraphRun, Sequence[Any]] | None = None

    @property
    def tracer(self) -> Tracer:
        found = self._live.traced()
        assert found is not None
        return found

    @property
    def labels(self) -> LabelTable:
        """What the tensors of the pass carry; to ask these takes no tracer."""
        live = self._live
        return live.labels if live.labels is not None else self.tracer.trace.labels

    def expect(self, whole: bool) -> None:
        """A graph is about to run."""
        self.settle()
        self.broken = self.broken or not whole

    def before_writes(self, labels: Labels, inputs: Sequence[Any]) -> None:
        """The graph is about to write to some of its inputs: what is held of these is copied."""
        tracer = self._live.tracer  # where there is none yet, nothing is held that could be lost
        if tracer is not None:
            labels.effects.before(tracer.trace.record, inputs)

    def after(
        self,
        ready: tuple[list[Any], Labels],
        inputs: Sequence[Any],
        outputs: Sequence[Any],
        own: int,
        volatile: bool,
    ) -> None:
        """The graph has run: keep its maps.

        Args:
            ready: what its inputs carried, and the labels that fit.
            own: how many of these are the model's.
            volatile: its next run overwrites them.
        """
        carried, labels = ready
        wants = self.capture.wants
        tensors = [outputs[p] if p >= 0 else inputs[-1 - p] for p in labels.places]
        copied = None
        if labels.picking or volatile or wants.conversion:
            read, tensors = tensors, self._stored(tensors, labels, volatile)
            copied = [stored is not tensor for stored, tensor in zip(tensors, read, strict=True)]
        if wants.detach:
            tensors = [t.detach() if t.requires_grad else t for t in tensors]
        run = GraphRun(labels, tensors, copied, carried)
        self.runs += 1
        self._segments.append(run)
        self._latest = (labels, run, outputs[:own])
        if not self.alone:
            self.settle()

    def _stored(self, tensors: list[Tensor], labels: Labels, volatile: bool) -> list[Tensor]:
        """What is to be stored of what a graph has returned, by slot."""
        wants = self.capture.wants
        found = []
        for tensor, m in zip(tensors, labels.sources, strict=True):
            if m.picked is not None and m.axes is not None:
                stored = wants.take(tensor, m.axes, m.picked, volatile)
            else:
                stored = wants.store(tensor, volatile)
            if volatile and stored is tensor and tensor.is_cuda:
                stored = stored.detach().clone() if wants.detach else stored.clone()
            found.append(stored)
        return found

    def settle(self) -> None:
        """More follows, which will ask what this graph's results carry, and may claim them."""
        if self._latest is None:
            return
        (labels, run, outputs), self._latest = self._latest, None
        record, effects = self.tracer.trace.record, labels.effects
        run.base = effects.base(record)
        self._segments.remove(run)
        effects.apply(record, zip(run.entries(), labels.maps, strict=True), run.inputs)
        results = [t for t in outputs if isinstance(t, Tensor)]
        for tensor, (_, label) in zip(results, effects.outputs, strict=False):
            # Computed from constants alone: known all the same, so not from outside.
            known = run.label(label) if isinstance(label, ChannelLabelRef) else STOP
            self.tracer.trace.labels.put(tensor, known)

    def finish(self, output: Any) -> None:
        """The compiled code has returned."""
        if self.alone and self.runs and not self.broken:
            if not self.capture.wants.outputs:
                self._latest = None
            return
        self.settle()
        if not self.unread and any(self.labels.of(t) is None for _, t in leaves(output)):
            self.outside()

    def hold_output(self, module: nn.Module, output: Any) -> None:
        """Keep what the model returns."""
        self.settle()
        origin = Origin("output", self.capture.names.of(module))
        for path, tensor in leaves(output):
            label = self.tracer.trace.labels.of(tensor)
            axes = label.axes if isinstance(label, ChannelLabel) else None
            held = self.tracer.trace.record.aliases.reference(tensor)
            self._segments.append(MapRecord("output", origin, held, axes, None, path))

    def outside(self) -> None:
        """Something was computed where nobody looked."""
        names = self.capture.names
        inside = [m for m in running.modules() if m in names.by_module]
        self.capture.miss(names.of(inside[-1]) if inside else "", Reason.GRAPH_BREAK.text())
