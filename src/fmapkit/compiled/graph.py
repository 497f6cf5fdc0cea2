"""Label a graph that dynamo has traced, and make it return its maps: before its backend sees it.

The graph (torch functions, in the order in which the model calls them, each with the modules it
runs in) is run once on fake tensors under the same tracer that learns eager passes, so the rules of
what is a σ and whose map it is are the same. What the tracer would have held becomes an output of
the graph. Where a nonlinearity works in place, z is cloned in the graph; inductor, which turns the
write into a new tensor, takes the clone out again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, fx, nn

from fmapkit.compiled.graph_edit import SigmaNode, open_call, opens
from fmapkit.compiled.graph_tracer import GraphTracer, NodeHeld
from fmapkit.compiled.run import CompiledCapture, GraphMap, Labels
from fmapkit.model import Names
from fmapkit.provenance import ChannelLabel, Origin
from fmapkit.reasons import Reason
from fmapkit.replay import Effects, Ref, Relations
from fmapkit.storage import MapRecord
from fmapkit.torchlib.fake_inputs import FakeInputs, UnreadableError
from fmapkit.torchlib.memory import storage_of
from fmapkit.torchlib.nested import leaves, tensors_in
from fmapkit.torchlib.transforms import undone_transforms
from fmapkit.tracing import Frame

_CALLS = ("call_function", "call_method")


@dataclass(slots=True)
class Traced:
    """What a trace of a graph found: the maps, each with the site to read it at."""

    # The last of each: it is a preactivation unless claimed outside.
    found: list[tuple[MapRecord, SigmaNode, bool]]
    refs: Callable[[Origin], Ref]
    effects: Effects

    def labels(self, places: Mapping[Any, int]) -> Labels:
        """The labels, once it is known where the graph returns each site."""
        maps = [
            GraphMap(
                *(e.kind, self.refs(e.origin), e.axes, e.sigma, "", e.picked),
                *(pending, places[site.key], site.copied),
            )
            for e, site, pending in self.found
        ]
        return Labels(maps, self.effects)


def trace_graph(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    carried: Sequence[Any],
    base: Sequence[nn.Module],
    capture: CompiledCapture,
    miss: Callable[[str, str], None],
    *,
    modules: dict[int, nn.Module],
    arguments: Sequence[int] | None,
) -> Traced:
    """Run a graph on fake tensors and say what its maps are.

    Args:
        carried: what each carries: `ChannelLabel`, `ParamLabel` or None.
        base: the modules that run around it, outermost first.
        modules: by the id that the graph knows them by.
        arguments: which inputs the innermost of `base` was given, where the graph is all of its
            call, which may be one nonlinearity; else None.
    """
    tracer = GraphTracer(capture.names, capture.wants, miss)
    order = list(gm.graph.nodes)
    with torch.inference_mode(False), torch.no_grad(), undone_transforms():
        run = _Labelling(gm, inputs, tracer, carried, base, modules, arguments)
        with run.fakes.mode:
            tracer.noted.now = order[0]
            for module in base[:-1]:
                tracer.modules.enter(module, (), {})
            for node in order:
                run.step(node)
    if tracer.failed is not None:
        raise tracer.failed
    return _traced(tracer, order, run.env, carried, capture.names)


class _OnFakes(fx.Interpreter):
    """Runs a graph on fake tensors, node by node: each may be replaced just before."""

    def __init__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.fakes = FakeInputs(inputs)
        self.args_iter = iter(self.fakes.values)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.fakes.of(super().get_attr(target, args, kwargs))

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        raise UnreadableError("its graph has a node of another kind (call_module)")

    def step(self, node: fx.Node) -> None:
        self.env[node] = self.run_node(node)


def open_all(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Open what dynamo has kept as one call, where it can be opened."""
    if not any(map(opens, gm.graph.nodes)):
        return
    with torch.inference_mode(False), torch.no_grad(), undone_transforms():
        at = _OnFakes(gm, inputs)
        with at.fakes.mode:
            for node in list(gm.graph.nodes):
                if node._erased or node.op == "output":
                    continue
                if opens(node):
                    args, kwargs = at.fetch_args_kwargs_from_env(node)
                    if open_call(node, args, kwargs, at.env):
                        continue
                at.step(node)
    gm.recompile()


class _Labelling(_OnFakes):
    """Runs a graph under the tracer, whose frames are entered and left as the nodes say.

    What it is given is said at `trace_graph`.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        inputs: Sequence[Any],
        tracer: GraphTracer,
        carried: Sequence[Any],
        base: Sequence[nn.Module],
        modules: dict[int, nn.Module],
        arguments: Sequence[int] | None,
    ) -> None:
        super().__init__(gm, inputs)
        pairs = zip(self.fakes.values, inputs, strict=True)
        stand_ins = {id(f): (f, real) for f, real in pairs if isinstance(real, Tensor)}
        tracer.layers.stand_ins = stand_ins
        self._tracer = tracer
        self._carried = iter(carried)
        self._base = base
        self._modules = modules
        self._arguments = arguments
        self._order = [n for n in gm.graph.nodes if n.op in _CALLS]
        self._keys = {n: _keys(n, modules) for n in self._order}
        self._entered: list[tuple[str, list[fx.Node]]] = []  # calls of modules, with their nodes
        self._innermost: Frame | None = None

    def step(self, node: fx.Node) -> None:
        noted = self._tracer.noted
        noted.now = node
        if node.op != "placeholder" and self._base and self._innermost is None:
            given = tuple(self.fakes.values[i] for i in self._arguments or ())
            self._innermost = self._tracer.modules.enter(self._base[-1], given, {})
        if node.op in _CALLS:
            keys = self._keys[node]
            pairs = zip(keys, self._entered, strict=False)
            same = len(list(takewhile(lambda pair: pair[0] == pair[1][0], pairs)))
            self._leave(same)
            for depth in range(same, len(keys)):
                self._enter(node, keys[: depth + 1])
        super().step(node)
        if node.op != "output":
            noted.made(self.env[node], node)

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().placeholder(target, args, kwargs)
        self._tracer.trace.labels.put(value, next(self._carried))
        return value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        with self._tracer:
            return super().call_function(target, args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        with self._tracer:
            return getattr(type(args[0]), target)(*args, **kwargs)

    def output(self, target: Any, args: Any, kwargs: Any) -> Any:
        self._leave(0)
        frame, results = self._innermost, args[0]
        if frame is not None and frame.kind != "plain" and self._arguments is not None:
            self._tracer.leave(frame.module, results[0] if len(results) == 1 else results)
        return results

    def _enter(self, node: fx.Node, keys: list[str]) -> None:
        after = self._order[self._order.index(node) :]
        nodes = list(takewhile(lambda n: self._keys[n][: len(keys)] == keys, after))
        inside = set(nodes)
        operands = [o for n in nodes for o in n.all_input_nodes if o not in inside]
        given = [self.env.get(o) for o in dict.fromkeys(operands)]
        label = self._tracer.trace.labels.of
        labelled = [
            t for t in given if isinstance(t, Tensor) and isinstance(label(t), ChannelLabel)
        ]
        self._entered.append((keys[-1], nodes))
        self._tracer.modules.enter(self._module(keys[-1]), tuple(labelled), {})

    def _leave(self, depth: int) -> None:
        """Leave the modules that are entered below so many."""
        while len(self._entered) > depth:
            key, nodes = self._entered.pop()
            inside = set(nodes)
            results = [n for n in nodes if any(u not in inside for u in n.users)]
            values = [self.env[n] for n in results if isinstance(self.env[n], Tensor)]
            output: Any = values[0] if len(values) == 1 else tuple(values)
            self._tracer.leave(self._module(key), output)

    def _module(self, key: str) -> nn.Module:
        return self._modules[int(key.partition("@")[0])]


def _keys(node: fx.Node, modules: dict[int, nn.Module]) -> list[str]:
    """The module calls it runs in; a key is the module's id and which of its calls it is."""
    keys = [str(k) for k in node.meta.get("nn_module_stack") or ()]
    if not all(k.partition("@")[0].isdigit() for k in keys):
        raise UnreadableError("this version of torch does not say which modules a graph came from")
    return [k for k in keys if int(k.partition("@")[0]) in modules]


def _traced(
    tracer: GraphTracer,
    order: list[fx.Node],
    env: dict[fx.Node, Any],
    carried: Sequence[Any],
    names: Names,
) -> Traced:
    returned = fx.node.map_arg(order[-1].args[0], env.__getitem__)
    record = tracer.trace.record
    labels = [(path, tracer.trace.labels.of(t)) for path, t in leaves(returned)]
    relations = Relations(names, carried, labels, {})
    event_of = {id(e): event for event in record.events for _, e in event.entries}
    own = {storage_of(t) for _, t in leaves(returned)}
    makers = _makers(order, env)
    found = []
    for entry in record.current.segments:
        held = entry.held
        if held is None:
            continue
        assert isinstance(held, NodeHeld)
        site = held.site(own, makers)
        value = env.get(site.node)
        if value is not held.tensor:
            name = str(site.node.target).rpartition(".")[2]
            record.miss(entry.origin.name, Reason.ONE_CALL_IN_GRAPH.text(function=name))
            continue
        event = event_of.get(id(entry))
        found.append((entry, site, event is not None and relations.pending(entry, event)))
    given = [env[n] for n in order if n.op == "placeholder"]
    return Traced(found, relations.ref, relations.effects(record, record.events, given))


def _makers(order: list[fx.Node], env: dict[fx.Node, Any]) -> dict[int, fx.Node]:
    """Of all memory that a graph makes: the node that made it."""
    found: dict[int, fx.Node] = {}
    for node in order:
        for tensor in tensors_in(env[node]):
            found.setdefault(storage_of(tensor), node)
    return {memory: node for memory, node in found.items() if node.op in _CALLS}
