"""Change a graph: more outputs, which read what its sites give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from fmapkit.provenance import out_of_place


@dataclass(frozen=True, slots=True)
class SigmaNode:
    """Where in a graph a value is to be read: what a node gave, before or after another runs.

    Attributes:
        shared: an output of the model's own lies in the same memory.
        alone: nothing that ran before it has the same memory.
    """

    node: fx.Node
    at: fx.Node
    before: bool
    copied: bool
    shared: bool = False
    alone: bool = False

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
        gm: the graph.
        sites: what is to be read.
        gradients: it may be a part of an autograd graph.
        detach: the maps are to be none.

    Returns:
        Where each is, by its key: its place among the outputs, or -1 - that among the inputs.
    """
    graph = gm.graph
    last = next(n for n in reversed(graph.nodes) if n.op == "output")
    returned: Any = last.args[0]
    outputs = list(returned)
    inputs = {n: i for i, n in enumerate(n for n in graph.nodes if n.op == "placeholder")}
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
