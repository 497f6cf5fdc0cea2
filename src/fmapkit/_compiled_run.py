"""One pass of compiled code: its graphs return their maps too, and a sink labels and keeps them.

A compiled graph may run for other modules than those it was traced with (dynamo reuses code where
its guards hold), and its inputs may carry something else. So its labels belong to what came in:
the weights, by identity, what the data carry, and the modules around it. Where one of these is new,
the graph is labelled anew; it is not compiled anew.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx, nn

from fmapkit._axes import Axes
from fmapkit._graph import GraphMap, Labels, Traced, running_modules, trace_graph
from fmapkit._names import Names
from fmapkit._nested import leaves
from fmapkit._origin import NOWHERE, STOP, Flow, Origin, Weight
from fmapkit._plan import Ref
from fmapkit._store import Entry, Held, version_of
from fmapkit._trace import Tracer

__all__ = ["CompiledGraph", "GraphRun", "Sink", "running"]

OUTSIDE = (
    "torch.compile broke the graph here, and what was computed between the graphs ran outside of "
    "compiled code: nonlinearities in it are not captured"
)


class Running(threading.local):
    """The sinks that the compiled code of this thread brings its maps to, by place."""

    sinks: Sequence[Sink] = ()
    stop: Any = None  # the code of the function below which compiled code runs
    root: nn.Module | None = None  # the compiled module


running = Running()


class GraphRun:
    """The maps of one run of a compiled graph."""

    __slots__ = ("_base", "_maps", "_origins", "_tensors", "carried", "uncounted")

    def __init__(
        self, maps: Sequence[GraphMap], tensors: list[tuple[Tensor, int, bool]], carried: list[Any]
    ) -> None:
        self._maps = maps
        self._tensors = tensors
        self.carried = carried
        self.uncounted = any(version < 0 for _, version, _ in tensors)  # no version counter
        self._base: dict[str, int] = {}
        self._origins: dict[Ref, Origin] = {}

    def start_at(self, labels: Labels, counts: Any) -> None:
        """How many calls of each layer there were before."""
        self._base = {name: counts[name] for name, _ in labels.calls}

    def origin(self, ref: Ref | None) -> Origin:
        """The origin of this run that the labels speak of."""
        if ref is None:
            return NOWHERE
        if ref.kind == "input":
            tag = self.carried[ref.offset]
            return tag.origin if isinstance(tag, Flow) else NOWHERE
        found = self._origins.get(ref)
        if found is None:
            call = self._base.get(ref.name, 0) + ref.offset
            found = self._origins[ref] = Origin(ref.kind, ref.name, call)
            found.claimed = ref.claimed
        return found

    def entries(self) -> list[Entry]:
        """Every map, in execution order."""
        found = []
        shared: dict[int, Held] = {}
        for (tensor, version, copied), m in zip(self._tensors, self._maps, strict=False):
            if id(tensor) not in shared:
                shared[id(tensor)] = Held(tensor, version, m.copied or copied)
            held = shared[id(tensor)]
            found.append(Entry(m.kind, self.origin(m.ref), held, m.axes, m.sigma, "", m.picked))
        return found

    def release(self) -> None:
        """Let go of every tensor."""
        self._tensors = []
        self.carried = []


class Sink:
    """Where the compiled graphs of one pass bring their maps.

    Args:
        session: that captures.
        tracer: of the pass; it knows what tensors carry.
        alone: compiled code is all that the pass runs.
    """

    def __init__(self, session: Any, tracer: Tracer, alone: bool) -> None:
        self.session = session
        self.tracer = tracer
        self.alone = alone
        self.runs = 0
        self.unread = 0  # graphs that could not be labelled, and are named already
        self.broken = False  # some graph was not the whole of what was compiled
        self._latest: tuple[CompiledGraph, Labels, GraphRun, Sequence[Any]] | None = None

    def before(self, graph: CompiledGraph, place: int, inputs: Sequence[Any]) -> Any:
        """A graph is about to run: what its inputs carry, and what its maps will be."""
        self.settle()
        self.broken = self.broken or not graph.whole
        carried = graph.carried(inputs, self)
        labels = graph.labels(self, place, inputs, carried)
        for index in labels.writes:
            self.tracer.aliases.before_write(inputs[index])
        return carried, labels

    def after(
        self, graph: CompiledGraph, known: Any, inputs: Sequence[Any], outputs: Sequence[Any]
    ) -> None:
        """It has run: keep its maps."""
        carried, labels = known
        wants = self.session.wants
        tensors: list[tuple[Tensor, int, bool]] = []
        made: dict[Any, tuple[Tensor, int, bool]] = {}
        for m in labels.maps:
            key = (m.place, m.picked)
            if key not in made:
                tensor = outputs[m.place] if m.place >= 0 else inputs[-1 - m.place]
                if m.picked is not None:
                    stored = wants.take(tensor, m.axes, m.picked, graph.volatile)
                else:
                    stored = wants.store(tensor, graph.volatile)
                copied = stored is not tensor
                if not copied and wants.detach and tensor.requires_grad:
                    stored = tensor.detach()
                if graph.volatile and not copied and tensor.is_cuda:
                    stored = stored.clone()
                made[key] = (stored, version_of(stored), copied)
            tensors.append(made[key])
        run = GraphRun(labels.maps, tensors, carried)
        self.runs += 1
        self.session._current.segments.append(run)
        self._latest = (graph, labels, run, outputs)
        if not self.alone:
            self.settle()

    def settle(self) -> None:
        """More follows, which will ask what this graph's results carry, and may claim them."""
        if self._latest is None:
            return
        (graph, labels, run, outputs), self._latest = self._latest, None
        tracer = self.tracer
        run.start_at(labels, tracer.counts)
        segments = self.session._current.segments
        segments.remove(run)
        watched: set[int] = set()
        for entry, m in zip(run.entries(), labels.maps, strict=True):
            segments.append(entry)
            if entry.held is not None and id(entry.held) not in watched:
                watched.add(id(entry.held))
                tracer.aliases.watch(entry.held)
            if m.pending:
                tracer.pending.setdefault(id(entry.origin), []).append(entry)
        for name, count in labels.calls:
            tracer.counts[name] += count
        for index in labels.claims:
            tag = run.carried[index]
            if isinstance(tag, Flow):
                tracer.claim(tag.origin)
        results = [t for t in outputs[: graph.own] if isinstance(t, Tensor)]
        for tensor, tag in zip(results, labels.outputs, strict=False):
            # Computed from constants alone: known all the same, so not from outside.
            known = Flow(run.origin(tag[0]), tag[1]) if isinstance(tag, tuple) else STOP
            tracer.set_tag(tensor, known)

    def finish(self, output: Any) -> None:
        """The compiled code has returned."""
        if self.alone and self.runs and not self.broken:
            if not self.session.wants.outputs:
                self._latest = None
            return
        self.settle()
        if not self.unread and any(self.tracer.tag(t) is None for _, t in leaves(output)):
            self.outside()

    def hold_output(self, module: nn.Module, output: Any) -> None:
        """Keep what the model returns."""
        self.settle()
        origin = Origin("output", self.session.names.of(module))
        for path, tensor in leaves(output):
            tag = self.tracer.tag(tensor)
            axes = tag.axes if isinstance(tag, Flow) else None
            held = self.tracer.aliases.reference(tensor)
            self.session._current.segments.append(Entry("output", origin, held, axes, None, path))

    def outside(self) -> None:
        """Something was computed where nobody looked."""
        modules = running_modules(running.stop)
        names = self.session.names
        inside = [m for m in modules if m in names.by_module]
        self.session.miss(names.of(inside[-1]) if inside else "", OUTSIDE)


class CompiledGraph:
    """A compiled graph, as its sessions see it; `place` says which of them.

    Args:
        gm: the graph, rewritten but without the outputs that were added.
        inputs: the real ones it was traced with.
        whole: it is all of what was compiled, so that the same modules run it always.
        volatile: its outputs' memory is reused by its next run.
        names: of the captured model.

    Attributes:
        data: which inputs are tensors that are no parameters.
        local: which of these are no attributes of a module.
        own: how many outputs are the model's.
        places: where the graph returns what is read at a site.
    """

    def __init__(
        self, gm: fx.GraphModule, inputs: Sequence[Any], whole: bool, volatile: bool, names: Names
    ) -> None:
        self.gm = gm
        self.whole = whole
        self.volatile = volatile
        tensors = [i for i, v in enumerate(inputs) if isinstance(v, Tensor)]
        self.weights = [i for i in tensors if names.is_parameter(inputs[i])]
        self.data = [i for i in tensors if i not in self.weights]
        self.local = {i for i, n in enumerate(placeholders(gm)) if not from_module(n)}
        self.own = 0
        self.places: dict[Any, int] = {}
        # How the graph knows modules and weights: by what they were when it was traced.
        self._modules = {id(m): m for m in names.by_module}
        self._owners = [names.owners(inputs[i]) for i in self.weights]
        self._base = _base(names)
        self._known: dict[int, tuple[Any, dict[Any, tuple[Labels, list[Any]]]]] = {}

    def forget(self) -> None:
        """The block has ended."""
        self._known.clear()

    def carried(self, inputs: Sequence[Any], sink: Sink) -> list[Any]:
        """What the data that come in carry, by place among the inputs."""
        tag = sink.tracer.tag
        found: list[Any] = [None] * len(inputs)
        for i in self.data:
            found[i] = tag(inputs[i])
            if found[i] is None and i in self.local:
                found[i] = STOP
                sink.outside()
        return found

    def labels(self, sink: Sink, place: int, inputs: Sequence[Any], carried: list[Any]) -> Labels:
        """The labels that fit what comes in."""
        session = sink.session
        watch, known = self._known.get(place, (None, {}))
        if watch is not session._watch:  # another block, or another structure of the model
            known = {}
            self._known[place] = (session._watch, known)
        weights = [inputs[i] for i in self.weights]
        tags = [carried[i] for i in self.data]
        plain = all(t is STOP or t is None for t in tags)
        key = (
            tuple(map(id, weights)),
            tuple([t is None for t in tags]) if plain else session._carried(tags),
            None if self.whole else tuple(map(id, running_modules(running.stop))),
        )
        found = known.get(key)
        if found is None:  # kept with the weights, so that their ids stay theirs
            found = known[key] = (self._label(sink, inputs, carried), weights)
        return found[0]

    def trace(
        self, session: Any, inputs: Sequence[Any], carried: Sequence[Any], rewrite: bool
    ) -> Traced:
        """What the graph's maps are."""
        # Stand-ins: what the trace finds out about them is this graph's, not the pass's.
        origins: dict[int, Origin] = {id(NOWHERE): NOWHERE}
        full: list[Any] = []
        for tag in carried:
            if isinstance(tag, Flow):
                o = tag.origin
                own = origins.setdefault(id(o), Origin(o.kind, o.name, o.call))
                tag = Flow(own, tag.axes)
            full.append(tag)
        for i in self.weights:
            value = inputs[i]
            full[i] = Weight(value, Axes.single(0, value.shape[0]) if value.dim() else None)
        return trace_graph(
            self.gm,
            inputs,
            full,
            _base(session.names),
            session.names,
            session.wants,
            session.miss,
            rewrite=rewrite,
            modules=self._translated(inputs, session.names),
            arguments=sorted(self.local.intersection(self.data)) if self.whole else None,
        )

    def _label(self, sink: Sink, inputs: Sequence[Any], carried: list[Any]) -> Labels:
        session = sink.session
        traced = self.trace(session, inputs, carried, rewrite=False)
        lacking = [e for e, site, _ in traced.found if site.key not in self.places]
        for entry in lacking:
            session.miss(entry.origin.name, "its graph was compiled without this map")
        traced.found = [f for f in traced.found if f[1].key in self.places]
        return traced.labels(self.places)

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
    found = [m for m in running_modules(running.stop) if m in names.by_module]
    if running.root is not None and running.root not in found:
        found.append(running.root)
    return found


def placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    """The nodes of a graph's inputs."""
    return [n for n in gm.graph.nodes if n.op == "placeholder"]


def from_module(node: fx.Node) -> bool:
    """Whether an input of a graph is an attribute of a module, or a global, and no datum."""
    from torch._dynamo import source

    at: Any = getattr(node, "_dynamo_source", None)
    while at is not None:
        if isinstance(at, (source.NNModuleSource, source.GlobalSource)):
            return True
        at = getattr(at, "base", None)
    return False
