"""Functions that dynamo keeps as one call of a graph, opened: what runs inside becomes nodes.

`multi_head_attention_forward` is one. It is run once on fake tensors, and each torch function that
it calls becomes a node of the graph, with the same arguments: what is computed stays the same.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from fmapkit.provenance import describe
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
        node = self._node(func, self._nodes(args), self._nodes(kwargs))
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

    def _nodes(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.node_of(value)
        if isinstance(value, (tuple, list)):
            return type(value)(map(self._nodes, value))
        if isinstance(value, dict):
            return {k: self._nodes(v) for k, v in value.items()}
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
