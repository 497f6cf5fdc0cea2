"""Change a graph: in-place nonlinearities out of place, and more outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from fmapkit.provenance import describe, out_of_place
from fmapkit.torchlib.memory import storage_of
from fmapkit.torchlib.nested import tensors_in

__all__ = ["SigmaNode", "add_outputs", "run_out_of_place"]

# Nonlinearities whose in-place form has the same derivative formula, bit for bit. That of the ELU
# and leaky ReLU families is computed from a instead of z (torch, tools/autograd/derivatives.yaml).
SAME_GRADIENT = {
    *("relu", "relu6", "hardtanh", "sigmoid", "tanh", "silu", "hardswish", "mish", "hardsigmoid"),
    "threshold",
}


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


def run_out_of_place(node: fx.Node, env: dict[fx.Node, Any], outside: set[int], grad: bool) -> None:
    """An in-place σ out of place, where nobody could tell: no other name for its memory lives."""
    target: Any = node.target
    if node.op == "call_method":
        target = getattr(Tensor, str(node.target), None)
    if target is None:
        return
    known = describe(target)
    args, kwargs = node.args, dict(node.kwargs)
    if known.sigma is None or not (known.in_place or known.asked_in_place(args, kwargs)):
        return
    z = next((a for a in (*args, *kwargs.values()) if isinstance(a, fx.Node)), None)
    if z is None or not isinstance(env[z], Tensor) or "out" in kwargs:
        return
    memory = storage_of(env[z])
    if memory in outside or (grad and known.sigma not in SAME_GRADIENT):
        return
    for other, value in env.items():
        if other is z or not any(storage_of(t) == memory for t in tensors_in(value)):
            continue
        if any(user is node or user not in env for user in other.users):
            return
    other_form = out_of_place(target, args, kwargs)
    if other_form is None:
        return
    node.op = "call_function"
    node.target, node.args, node.kwargs = other_form
    for user in [u for u in z.users if u is not node and u not in env]:
        user.replace_input_with(z, node)


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
