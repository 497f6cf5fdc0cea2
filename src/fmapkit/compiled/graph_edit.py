"""Change a graph: more outputs, which read what its sites give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx


@dataclass(frozen=True, slots=True)
class SigmaNode:
    """Where in a graph a value is to be read: what a node gave, before or after another runs.

    Attributes:
        shared: an output of the model's own lies in the same memory.
    """

    node: fx.Node
    at: fx.Node
    before: bool
    copied: bool
    shared: bool = False

    @property
    def key(self) -> Any:
        """The same for the same site of a copy of the graph."""
        if not self.copied:
            return self.node.name
        return self.node.name, self.at.name, self.before


def add_outputs(gm: fx.GraphModule, sites: Sequence[SigmaNode], detach: bool) -> dict[Any, int]:
    """Make a graph return what its sites read, beside its own outputs.

    Outside of the autograd graph, as `detach`ed outputs are, they take no part in the backward. Not
    those that share memory with an output of the model's own: inductor returns one tensor for both,
    and autograd would take the model's output out of its graph, too.

    Returns:
        Where each is, by its key: its place among the outputs, or -1 - that among the inputs.
    """
    graph = gm.graph
    last = next(n for n in reversed(graph.nodes) if n.op == "output")
    returned: Any = last.args[0]
    outputs = list(returned)
    inputs = {n: i for i, n in enumerate(n for n in graph.nodes if n.op == "placeholder")}
    places: dict[Any, int] = {}
    for site in sites:
        if site.key in places:
            continue
        if not site.copied and site.node in inputs:
            places[site.key] = -1 - inputs[site.node]
        elif not site.copied and site.node in outputs:
            places[site.key] = outputs.index(site.node)
        else:
            places[site.key] = len(outputs)
            outputs.append(_read(graph, site, last, detach))
    last.args = (tuple(outputs), *last.args[1:])
    graph.lint()
    gm.recompile()
    return places


def _read(graph: fx.Graph, site: SigmaNode, last: fx.Node, detach: bool) -> fx.Node:
    at = last
    if site.copied:
        at = site.at if site.before else site.at.next
    node = site.node
    with graph.inserting_before(at):
        detached = detach and (site.copied or not site.shared)
        for method in ("detach",) * detached + ("clone",) * site.copied:
            read = graph.call_method(method, (node,))
            # Some passes of backends ask for it; its shape and type are those of the value read.
            read.meta.update({k: v for k, v in node.meta.items() if k == "example_value"})
            node = read
    return node
