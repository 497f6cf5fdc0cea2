"""A compiled graph in use: which labels its maps have this time.

A compiled graph may run for other modules than those it was traced with (dynamo reuses code where
its guards hold), and its inputs may carry something else. So its labels belong to what came in:
the weights, by identity, what the data carry, and the modules around it. Where one of these is new,
the graph is labelled anew; it is not compiled anew.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from fmapkit.compiled.graph import Traced, trace_graph
from fmapkit.compiled.run import CompiledCapture, GraphMapSink, Labels, running
from fmapkit.model import Names
from fmapkit.provenance import NOWHERE, STOP, ChannelLabel, Label, Origin, ParamLabel
from fmapkit.reasons import Reason
from fmapkit.replay import form_of_labels
from fmapkit.torchlib.dynamo import from_module
from fmapkit.tracing import LabelTable


class _Labelled:
    """The labels of a graph's maps, and what was not captured, of one kind of run."""

    def __init__(
        self, labels: Labels, weights: list[Tensor], missed: list[tuple[str, str]]
    ) -> None:
        self.labels = labels
        # That came in. Their ids tell the kind of run, as long as it is still they.
        self._weights = list(map(weakref.ref, weights))
        self._missed = missed  # the layer and the reason of each entry
        self._told: Any = None

    @property
    def alive(self) -> bool:
        """Whether the weights are still there, and may come in again."""
        return all(ref() is not None for ref in self._weights)

    def of(self, weights: list[Tensor]) -> bool:
        """Whether these are the weights."""
        return all(ref() is weight for ref, weight in zip(self._weights, weights, strict=True))

    def tell(self, capture: CompiledCapture) -> None:
        """Name what was not captured, once in each block."""
        if self._missed and (self._told is None or self._told() is not capture):
            self._told = weakref.ref(capture)
            for layer, why in self._missed:
                capture.miss(layer, why)


class _Known:
    """The labels of a graph's maps for a capture, and for later ones with the same names."""

    def __init__(self, capture: CompiledCapture) -> None:
        self._watch: Any = weakref.ref(capture.structure)
        self._names = dict(capture.names.by_name)
        self.labels: dict[Any, _Labelled] = {}

    def holds(self, capture: CompiledCapture) -> bool:
        """Whether the model still has these modules, under these names."""
        if self._watch() is capture.structure:
            return True
        self._watch = weakref.ref(capture.structure)  # another block, or the structure has changed
        return capture.names.by_name == self._names


@dataclass(frozen=True, slots=True)
class _Latest:
    """The latest run of a graph that was all of a pass."""

    state: Any  # what was known of the model
    fixed: list[Any]  # its weights and buffers
    arguments: list[int]  # at which places data came in that had no layer yet
    carried: list[Label]  # what all that came in carried
    labels: Labels
    ids: frozenset[int]  # of the weights and buffers

    def fits(self, labels: LabelTable, fixed: list[int], inputs: Sequence[Any]) -> bool:
        """Whether what comes in carries the same as then."""
        for i, known in zip(fixed, self.fixed, strict=True):
            if inputs[i] is not known:
                return False
        for i in self.arguments:
            if labels.of(inputs[i]) is not STOP:
                return False
        return labels.none_of(self.ids)


class CompiledGraph:
    """A compiled graph, as its sessions see it; `place` says which of them."""

    def __init__(
        self, gm: fx.GraphModule, inputs: Sequence[Any], whole: bool, volatile: bool, names: Names
    ) -> None:
        self.gm = gm  # opened, but without the outputs that were added
        self.whole = whole  # all of what was compiled, so that the same modules run it always
        self.volatile = volatile  # its outputs' memory is reused by its next run
        tensors = [i for i, v in enumerate(inputs) if isinstance(v, Tensor)]
        self.weights = [i for i in tensors if names.is_parameter(inputs[i])]
        self.data = [i for i in tensors if i not in self.weights]  # no parameters
        placeholders = gm.graph.find_nodes(op="placeholder")
        # Those that are no attributes of a module.
        self.local = {i for i, n in enumerate(placeholders) if not from_module(n)}
        (last,) = gm.graph.find_nodes(op="output")
        self.own = self.returned = len(last.args[0])  # outputs of the model's; all outputs
        self.places: dict[Any, int] = {}  # where the graph returns what is read at a site
        # How the graph knows modules and weights: by what they were when it was traced.
        self._modules = {id(m): m for m in names.by_module}
        self._owners = [names.owners(inputs[i]) for i in self.weights]
        self._base = _base(names)
        self._known: dict[int, _Known] = {}
        # Of the latest run: a graph that is all of a pass has nothing new to ask in the next one,
        # where the same weights and buffers come in, and other data.
        self._fixed = [i for i in tensors if i not in self.local]
        self._latest: dict[int, _Latest] = {}

    def forget(self) -> None:
        """The block has ended: what is kept for the next one keeps no tensor alive."""
        self._latest.clear()
        for known in list(self._known.values()):  # which another thread may be adding to
            for key, found in list(known.labels.items()):
                if not found.alive:
                    known.labels.pop(key, None)

    def ready(
        self, sink: GraphMapSink, place: int, inputs: Sequence[Any]
    ) -> tuple[list[Label], Labels]:
        """What the data that come in carry, by place among the inputs, and the labels that fit."""
        alone = self.whole and sink.alone and not sink.runs
        state = (sink.capture.structure, sink.capture.names.version)
        latest = self._latest.get(place)
        if alone and latest is not None and latest.state == state:
            if latest.fits(sink.labels, self._fixed, inputs):
                return latest.carried, latest.labels
        carried = self.carried(inputs, sink)
        labels = self.labels(sink, place, inputs, carried)
        arguments = [i for i in self.data if i in self.local]
        if alone and all(carried[i] is STOP for i in arguments) and not sink.capture.names.lent:
            fixed = [inputs[i] for i in self._fixed]
            ids = frozenset(map(id, fixed))
            self._latest[place] = _Latest(state, fixed, arguments, carried, labels, ids)
        return carried, labels

    def carried(self, inputs: Sequence[Any], sink: GraphMapSink) -> list[Label]:
        """What the data that come in carry, by place among the inputs."""
        label = sink.labels.of
        found: list[Label] = [None] * len(inputs)
        for i in self.data:
            found[i] = label(inputs[i])
            if found[i] is None and i in self.local:
                found[i] = STOP
                sink.outside()
        return found

    def labels(
        self, sink: GraphMapSink, place: int, inputs: Sequence[Any], carried: list[Label]
    ) -> Labels:
        """The labels that fit what comes in."""
        capture = sink.capture
        state = self._known.get(place)
        if state is None or not state.holds(capture):
            state = self._known[place] = _Known(capture)
        weights = [inputs[i] for i in self.weights]
        labels = [carried[i] for i in self.data]
        plain = all(t is STOP or t is None for t in labels)
        key = (
            tuple(map(id, weights)),
            tuple([t is None for t in labels])
            if plain
            else form_of_labels(labels, capture.wants.of),
            None if self.whole else tuple(map(id, running.modules())),
        )
        found = state.labels.get(key)
        if found is None or not found.of(weights):
            found = state.labels[key] = self._label(sink, inputs, carried, weights)
        found.tell(capture)
        return found.labels

    def trace(
        self,
        capture: CompiledCapture,
        inputs: Sequence[Any],
        carried: Sequence[Any],
        miss: Callable[[str, str], None],
    ) -> Traced:
        """What the graph's maps are; what cannot be captured goes to `miss`."""
        # Stand-ins: what the trace finds out about them is this graph's, not the pass's.
        origins: dict[int, Origin] = {id(NOWHERE): NOWHERE}
        full: list[Any] = []
        for label in carried:
            if isinstance(label, ChannelLabel):
                o = label.origin
                own = origins.setdefault(id(o), Origin(o.kind, o.name, o.call, o.made))
                label = ChannelLabel(own, label.axes)
            full.append(label)
        for i in self.weights:
            full[i] = ParamLabel.whole(inputs[i])
        return trace_graph(
            *(self.gm, inputs, full, _base(capture.names), capture, miss),
            modules=self._translated(inputs, capture.names),
            arguments=sorted(self.local.intersection(self.data)) if self.whole else None,
        )

    def _label(
        self, sink: GraphMapSink, inputs: Sequence[Any], carried: list[Label], weights: list[Tensor]
    ) -> _Labelled:
        missed: list[tuple[str, str]] = []
        traced = self.trace(
            sink.capture, inputs, carried, lambda layer, why: missed.append((layer, why))
        )
        for entry, site, _ in traced.found:
            if site.key not in self.places:
                missed.append((entry.origin.name, Reason.GRAPH_WITHOUT_MAP.text()))
        traced.found = [f for f in traced.found if f[1].key in self.places]
        return _Labelled(traced.labels(self.places), weights, missed)

    def _translated(self, inputs: Sequence[Any], names: Names) -> dict[int, nn.Module]:
        """The modules that run now, by the ids of those that the graph was traced with.

        Told by the weights that come in: their owners, and what lies above and below these.
        """
        now = _base(names)
        pairs = [(b, n) for b, n in zip(self._base[-1:], now[-1:], strict=False)]
        for before, i in zip(self._owners, self.weights, strict=True):
            after = names.owners(inputs[i])
            if len(before) == 1 and len(after) == 1 and before[0][1] == after[0][1]:
                pairs.append((before[0][0], after[0][0]))
        if all(b is n for b, n in pairs):
            return self._modules
        moved: dict[str, set[str]] = {}
        for b, n in pairs:
            old, new = names.of(b), names.of(n)
            while True:
                moved.setdefault(old, set()).add(new)
                head, _, last = old.rpartition(".")
                new_head, _, new_last = new.rpartition(".")
                if not old or not new or last != new_last:
                    break
                old, new = head, new_head
        found = {}
        for key, module in self._modules.items():
            name, below = names.of(module), ""
            while name not in moved and name:
                name, _, last = name.rpartition(".")
                below = f".{last}{below}"
            targets = moved.get(name, {name})
            target = names.by_name.get(f"{next(iter(targets))}{below}".lstrip("."))
            if len(targets) == 1 and target is not None:
                found[key] = target
        return found


def _base(names: Names) -> list[nn.Module]:
    """The modules of the model that run around compiled code, outermost first."""
    return [m for m in running.modules() if m in names.by_module]
