"""Change a graph: calls that dynamo keeps as one are opened; its sites become outputs.

`multi_head_attention_forward` is such a call. It is run once on fake tensors, and each torch
function that it calls becomes a node of the graph, with the same arguments: what is computed stays
the same.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from fmapkit.provenance import describe, out_of_place
from fmapkit.torchlib.nested import tensors_in


class _ClosedError(Exception):
    """It cannot be opened here."""


def opens(node: fx.Node) -> bool:
    """Whether a node is a call that can be opened, of tensors whose shapes do not change."""
    if node.op != "call_function" or describe(node.target).opened is None:
        return False
    shapes = [getattr(n.meta.get("example_value"), "shape", ()) for n in node.all_input_nodes]
    return all(isinstance(size, int) for shape in shapes for size in shape)


class _Recorder(TorchFunctionMode):
    """Writes each torch function that runs as a node of a graph."""

    def __init__(self, graph: fx.Graph, meta: dict[str, Any], known: dict[int, Any]) -> None:
        super().__init__()
        self._graph = graph
        self._meta = {k: v for k, v in meta.items() if k != "example_value"}
        self.known = known  # by the id of a tensor: the tensor, and the node that made it
        self.made: list[fx.Node] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if tensors_in(out):
            self._record(func, args, kwargs, out)
        elif describe(func).in_place or not describe(func).silent:
            raise _ClosedError
        return out

    def _record(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        node = self._node(func, *fx.node.map_aggregate((args, kwargs), self._given))
        if isinstance(out, Tensor):
            self.known[id(out)] = (out, node)
            return
        for place, item in enumerate(out):
            if not isinstance(item, Tensor):
                raise _ClosedError
            part = self._node(operator.getitem, (node, place), {})
            self.known[id(item)] = (item, part)

    def node_of(self, value: Any) -> fx.Node:
        """The node that made a tensor."""
        if id(value) not in self.known:
            raise _ClosedError
        node: fx.Node = self.known[id(value)][1]
        return node

    def _node(self, func: Any, args: Any, kwargs: Any) -> fx.Node:
        node = self._graph.call_function(func, args, kwargs)
        node.meta.update(self._meta)
        self.made.append(node)
        return node

    def _given(self, value: Any) -> Any:
        """What stands for an argument in the graph."""
        if isinstance(value, Tensor):
            return self.node_of(value)
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            raise _ClosedError
        return value


def open_call(node: fx.Node, args: Any, kwargs: Any, env: dict[fx.Node, Any]) -> bool:
    """Put what runs inside a call in its place.

    Args:
        args: its arguments, as fake tensors.
        env: what the nodes before it gave; the new ones are added.

    Returns:
        Whether it could be opened; if not, the graph is as it was.
    """
    operands = [(env[n], n) for n in node.all_input_nodes]
    known = {id(t): (t, n) for t, n in operands if isinstance(t, Tensor)}
    graph = node.graph
    with graph.inserting_before(node):
        recorder = _Recorder(graph, node.meta, known)
        try:
            with recorder:
                out = describe(node.target).opened(*args, **kwargs)
            readers = list(node.users)
            if any(u.target is not operator.getitem for u in readers):
                raise _ClosedError
            results = [recorder.node_of(out[u.args[1]]) for u in readers]
        except _ClosedError:
            for made in reversed(recorder.made):
                graph.erase_node(made)
            return False
    for user, result in zip(readers, results, strict=True):
        user.replace_all_uses_with(result)
        graph.erase_node(user)
    graph.erase_node(node)
    env.update({made: value for value, made in recorder.known.values()})
    return True


@dataclass(frozen=True, slots=True)
class SigmaNode:
    """Where in a graph a value is to be read: what a node gave, before or after another runs."""

    node: fx.Node
    at: fx.Node
    before: bool
    copied: bool
    shared: bool = False  # an output of the model's own lies in the same memory
    alone: bool = False  # nothing that ran before it has the same memory

    @property
    def key(self) -> Any:
        """The same for the same site of a copy of the graph."""
        if not self.copied:
            return self.node.name
        return self.node.name, self.at.name, self.before


def add_outputs(
    gm: fx.GraphModule, sites: Sequence[SigmaNode], gradients: bool, detach: bool
) -> dict[Any, int]:
    """Make a graph return what its sites read, beside its own outputs.

    Outside of the autograd graph, as `detach`ed outputs are, they take no part in the backward. Not
    those that share memory with an output of the model's own: inductor returns one tensor for both,
    and autograd would take the model's output out of its graph, too.

    Args:
        gradients: it may be a part of an autograd graph.
        detach: the maps are to be none.

    Returns:
        Where each is, by its key: its place among the outputs, or -1 - that among the inputs.
    """
    graph = gm.graph
    (last,) = graph.find_nodes(op="output")
    outputs = list(last.args[0])
    inputs = {n: i for i, n in enumerate(graph.find_nodes(op="placeholder"))}
    places: dict[Any, int] = {}
    kept = set() if gradients else {s.node for s in sites if s.copied and _write_apart(s)}
    for site in sites:
        if site.key in places:
            continue
        if not site.copied and site.node in inputs:
            places[site.key] = -1 - inputs[site.node]
        elif not site.copied and site.node in outputs:
            places[site.key] = outputs.index(site.node)
        else:
            places[site.key] = len(outputs)
            copied = site.copied and site.node not in kept
            outputs.append(_read(graph, site, last, detach and gradients, copied))
    last.args = (tuple(outputs), *last.args[1:])
    graph.lint()
    gm.recompile()
    return places


def _read(graph: fx.Graph, site: SigmaNode, last: fx.Node, detach: bool, copied: bool) -> fx.Node:
    at = last
    detached = detach and (site.copied or not site.shared)
    if copied:
        at = site.at if site.before else site.at.next
    node = site.node
    with graph.inserting_before(at):
        for method in ("detach",) * detached + ("clone",) * copied:
            read = graph.call_method(method, (node,))
            # Some passes of backends ask for it; its shape and type are those of the value read.
            read.meta.update({k: v for k, v in node.meta.items() if k == "example_value"})
            node = read
    return node


def _write_apart(site: SigmaNode) -> bool:
    """Have a nonlinearity that overwrites z write its result elsewhere, if nobody can tell.

    Where nothing else has the memory of z, and nothing else reads it, z is what it was for good.
    That spares the copy. With gradients, autograd would notice: it has the model's writes counted.
    """
    z, users = site.node, [*site.node.users]
    if not site.alone or len(users) != 1 or site.at not in (z, *users):
        return False
    sigma = users[0]
    function = getattr(Tensor, str(sigma.target)) if sigma.op == "call_method" else sigma.target
    other = out_of_place(function, sigma.args, dict(sigma.kwargs))
    if other is None or sigma.args[:1] != (z,):
        return False
    sigma.op = "call_function"
    sigma.target, sigma.args, sigma.kwargs = other
    return True
