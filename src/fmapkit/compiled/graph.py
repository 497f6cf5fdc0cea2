"""Label a graph that dynamo has traced, and make it return its maps: before its backend sees it.

The graph (torch functions, in the order in which the model calls them, each with the modules it
runs in) is run once on fake tensors under the same tracer that learns eager passes, so the rules of
what is a σ and whose map it is are the same. What the tracer would have held becomes an output of
the graph. In-place nonlinearities are rewritten out of place, or z is cloned in the graph, by the
same conditions as in eager mode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fmapkit.compiled.graph_edit import SigmaNode, run_out_of_place
from fmapkit.compiled.graph_open import open_call, opens
from fmapkit.compiled.graph_tracer import GraphTracer, NodeHeld
from fmapkit.compiled.labels import GraphMap, Labels
from fmapkit.model import Names
from fmapkit.provenance import NOWHERE, ChannelLabel, Origin, ParamLabel
from fmapkit.replay import Ref
from fmapkit.selection import Selection
from fmapkit.storage import MapRecord
from fmapkit.torchlib.fake_inputs import FakeInputs, UnreadableError
from fmapkit.torchlib.memory import storage_of
from fmapkit.torchlib.nested import leaves, tensors_in
from fmapkit.torchlib.transforms import undone_transforms
from fmapkit.tracing import Frame

__all__ = ["Traced", "trace_graph"]

_CALLS = ("call_function", "call_method")


@dataclass(slots=True)
class Traced:
    """What a trace of a graph found: the maps, each with the site to read it at."""

    found: list[
        tuple[MapRecord, SigmaNode, bool]
    ]  # the last: a preactivation unless claimed outside
    refs: Callable[[Origin], Ref]
    calls: tuple[tuple[str, int], ...]
    outputs: tuple[Any, ...]
    claims: tuple[int, ...]
    writes: tuple[int, ...]

    def labels(self, places: Mapping[Any, int]) -> Labels:
        """The labels, once it is known where the graph returns each site."""
        return Labels(
            tuple(
                GraphMap(
                    places[site.key],
                    entry.kind,
                    self.refs(entry.origin),
                    entry.axes,
                    entry.sigma,
                    entry.picked,
                    pending,
                    site.copied,
                )
                for entry, site, pending in self.found
            ),
            self.calls,
            self.outputs,
            self.claims,
            self.writes,
        )


def trace_graph(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    carried: Sequence[Any],
    base: Sequence[nn.Module],
    names: Names,
    wants: Selection,
    miss: Callable[[str, str], None],
    *,
    rewrite: bool,
    modules: dict[int, nn.Module],
    arguments: Sequence[int] | None,
) -> Traced:
    """Run a graph on fake tensors and say what its maps are.

    Args:
        gm: the graph; its in-place nonlinearities are rewritten.
        inputs: its real inputs.
        carried: what each carries: `ChannelLabel`, `ParamLabel` or None.
        base: the modules that run around it, outermost first.
        names: of the captured model.
        wants: of the capture.
        miss: to name what cannot be captured.
        rewrite: whether in-place nonlinearities may be rewritten: not once it is compiled.
        modules: by the id that the graph knows them by.
        arguments: which inputs the innermost of `base` was given, where the graph is all of its
            call, which may be one nonlinearity; else None.
    """
    tracer = GraphTracer(names, wants, miss)
    grad = torch.is_grad_enabled()
    env: dict[fx.Node, Any] = {}
    with torch.inference_mode(False), torch.no_grad(), undone_transforms():
        if rewrite and any(map(opens, gm.graph.nodes)):
            _open_all(gm, FakeInputs(inputs))
        order = list(gm.graph.nodes)
        fakes = FakeInputs(inputs)
        pairs = zip(fakes.values, inputs, strict=True)
        stand_ins = {id(f): (f, real) for f, real in pairs if isinstance(real, Tensor)}
        tracer.layers.stand_ins = stand_ins
        with fakes.mode:
            _run(gm, order, env, fakes, tracer, carried, base, modules, rewrite, grad, arguments)
    if tracer.failed is not None:
        raise tracer.failed
    return _traced(tracer, order, env, carried)


def _open_all(gm: fx.GraphModule, fakes: FakeInputs) -> None:
    """Open what dynamo has kept as one call, where it can be opened."""
    env: dict[fx.Node, Any] = {}
    given = iter(fakes.values)
    with fakes.mode:
        for node in list(gm.graph.nodes):
            if node.op == "placeholder":
                env[node] = next(given)
            elif node.op == "get_attr":
                env[node] = fakes.of(_attribute(gm, node))
            elif node.op in _CALLS and not node._erased:
                args = fx.node.map_arg(node.args, env.__getitem__)
                kwargs = fx.node.map_arg(node.kwargs, env.__getitem__)
                if opens(node) and open_call(node, args, kwargs, env):
                    continue
                env[node] = _call(node, args, kwargs)
    gm.recompile()


def _attribute(gm: fx.GraphModule, node: fx.Node) -> Any:
    value: Any = gm
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def _call(node: fx.Node, args: Any, kwargs: Any) -> Any:
    function: Any = node.target
    if node.op == "call_method":
        function = getattr(type(args[0]), str(node.target))
    return function(*args, **kwargs)


def _run(
    gm: fx.GraphModule,
    order: list[fx.Node],
    env: dict[fx.Node, Any],
    fakes: FakeInputs,
    tracer: GraphTracer,
    carried: Sequence[Any],
    base: Sequence[nn.Module],
    modules: dict[int, nn.Module],
    rewrite: bool,
    grad: bool,
    arguments: Sequence[int] | None,
) -> None:
    def load(value: Any) -> Any:
        return fx.node.map_arg(value, env.__getitem__)

    stacks = _Stacks(order, modules, tracer, env)
    noted = tracer.noted
    noted.now = order[0]
    for module in base[:-1]:
        tracer.enter(module, (), {})
    values = iter(zip(fakes.values, carried, strict=True))
    outside: set[int] = set()  # memory that was there before the graph
    innermost: Frame | None = None
    for node in order:
        noted.now = node
        if base and innermost is None and node.op != "placeholder":
            given = tuple(fakes.values[i] for i in arguments or ())
            innermost = tracer.enter(base[-1], given, {})
        if node.op == "placeholder":
            env[node], tag = next(values)
            noted.made(env[node], node)
            tracer.set_tag(env[node], tag)
            outside.update(map(storage_of, tensors_in(env[node])))
        elif node.op == "get_attr":
            env[node] = fakes.of(_attribute(gm, node))
            noted.made(env[node], node)
            outside.update(map(storage_of, tensors_in(env[node])))
        elif node.op in _CALLS:
            stacks.move(node)
            if rewrite:
                run_out_of_place(node, env, outside, grad)
            args, kwargs = load(node.args), load(node.kwargs)
            with tracer:
                env[node] = _call(node, args, kwargs)
            noted.made(env[node], node)
        elif node.op == "output":
            stacks.leave()
            if innermost is not None and innermost.kind != "plain" and arguments is not None:
                results = load(node.args[0])
                single = len(results) == 1
                tracer.leave(innermost.module, results[0] if single else results)
        else:
            raise UnreadableError(f"its graph has a node of another kind ({node.op})")


class _Stacks:
    """Keeps the tracer's frames at what runs: modules are entered and left as the nodes say."""

    def __init__(
        self,
        order: list[fx.Node],
        modules: dict[int, nn.Module],
        tracer: GraphTracer,
        env: dict[fx.Node, Any],
    ) -> None:
        self._order = [n for n in order if n.op in _CALLS]
        self._keys = {n: _keys(n, modules) for n in self._order}
        self._place = {n: i for i, n in enumerate(self._order)}
        self._modules = modules
        self._tracer = tracer
        self._env = env
        self._running: list[tuple[str, list[fx.Node]]] = []

    def move(self, node: fx.Node) -> None:
        """Leave what does not run any more, enter what does."""
        keys = self._keys[node]
        same = 0
        while same < min(len(keys), len(self._running)) and self._running[same][0] == keys[same]:
            same += 1
        while len(self._running) > same:
            self._leave()
        for at in range(same, len(keys)):
            self._enter(node, keys[: at + 1])

    def leave(self) -> None:
        """The graph ends."""
        while self._running:
            self._leave()

    def _enter(self, node: fx.Node, keys: list[str]) -> None:
        nodes = []
        for other in self._order[self._place[node] :]:
            if self._keys[other][: len(keys)] != keys:
                break
            nodes.append(other)
        inside = set(nodes)
        given: dict[fx.Node, None] = {}
        for n in nodes:
            for operand in n.all_input_nodes:
                data = isinstance(self._env.get(operand), Tensor)
                if operand not in inside and data:
                    if isinstance(self._tracer.tag(self._env[operand]), ChannelLabel):
                        given[operand] = None
        self._running.append((keys[-1], nodes))
        module = self._modules[int(keys[-1].partition("@")[0])]
        self._tracer.enter(module, tuple(self._env[g] for g in given), {})

    def _leave(self) -> None:
        key, nodes = self._running.pop()
        inside = set(nodes)
        results = [n for n in nodes if any(u not in inside for u in n.users)]
        values = [self._env[n] for n in results if isinstance(self._env[n], Tensor)]
        output: Any = values[0] if len(values) == 1 else tuple(values)
        self._tracer.leave(self._modules[int(key.partition("@")[0])], output)


def _keys(node: fx.Node, modules: dict[int, nn.Module]) -> list[str]:
    """The module calls it runs in; a key is the module's id and which of its calls it is."""
    keys = [str(k) for k in node.meta.get("nn_module_stack") or ()]
    if not all(k.partition("@")[0].isdigit() for k in keys):
        raise UnreadableError("this version of torch does not say which modules a graph came from")
    return [k for k in keys if int(k.partition("@")[0]) in modules]


def _traced(
    tracer: GraphTracer, order: list[fx.Node], env: dict[fx.Node, Any], carried: Sequence[Any]
) -> Traced:
    by_origin: dict[int, Ref] = {}
    for index, tag in enumerate(carried):
        if isinstance(tag, ChannelLabel) and tag.origin is not NOWHERE:
            by_origin.setdefault(id(tag.origin), Ref("input", "", index))

    def ref(origin: Origin) -> Ref:
        found = by_origin.get(id(origin))
        return found or Ref(origin.kind, origin.name, origin.call, origin.claimed, origin.made)

    returned = fx.node.map_arg(order[-1].args[0], env.__getitem__)
    tags = [tracer.tag(t) for _, t in leaves(returned)]
    escaping = {id(t.origin) for t in tags if isinstance(t, ChannelLabel)}
    kind_of = {id(e): event.kind for event in tracer.events for _, e in event.entries}
    own = {storage_of(t) for _, t in leaves(returned)}
    found = []
    for entry in tracer.current.segments:
        held = entry.held
        if held is None:
            continue
        assert isinstance(held, NodeHeld)
        site = held.site(own)
        value = env.get(site.node)
        if value is not held.tensor:
            name = str(site.node.target).rpartition(".")[2]
            tracer.miss(
                entry.origin.name,
                f"it runs inside {name}, which torch.compile keeps as one call",
            )
            continue
        pending = entry.kind == "preactivation" and kind_of.get(id(entry)) == "layer"
        found.append((entry, site, pending and id(entry.origin) in escaping))
    claimed = {id(e.origin) for e in tracer.events if e.kind == "sigma"}
    placeholders = [n for n in order if n.op == "placeholder"]
    return Traced(
        found,
        ref,
        tuple(tracer.counts.items()),
        tuple(
            (ref(t.origin) if t.origin is not NOWHERE else None, t.axes)
            if isinstance(t, ChannelLabel)
            else ("weight" if isinstance(t, ParamLabel) else None)
            for t in tags
        ),
        tuple(sorted(by_origin[i].offset for i in by_origin if i in claimed)),
        tuple(
            i
            for i, n in enumerate(placeholders)
            if isinstance(env[n], Tensor) and storage_of(env[n]) in tracer.aliases.written
        ),
    )
