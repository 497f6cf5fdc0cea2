"""The tracer of eager passes, on a graph: it labels, and notes where a map is to be read."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from types import FrameType
from typing import Any

from torch import Tensor, fx, nn

from fmapkit.compiled.graph_edit import SigmaNode
from fmapkit.model import Names
from fmapkit.provenance import ChannelLayout
from fmapkit.reasons import Reason
from fmapkit.selection import Selection
from fmapkit.storage import Aliases, Pass, StoredTensor
from fmapkit.torchlib.memory import storage_of, version_of
from fmapkit.torchlib.nested import tensors_in
from fmapkit.tracing import LabelTable, PassTrace, Record, Tracer


class NodeHeld(StoredTensor):
    """Stands for a tensor of the graph: where it is to be read."""

    def __init__(self, tensor: Tensor, node: fx.Node | None, at: fx.Node) -> None:
        super().__init__(tensor, version_of(tensor), own=False)
        self.node = node  # None: the node at which it was noted makes it
        self.at = at

    def snapshot(self, leads_on: bool = False) -> None:
        """It is about to be overwritten: the graph has to copy it."""
        self.copied = True

    def site(self, own: Container[int], makers: Mapping[int, fx.Node]) -> SigmaNode:
        """Where to read it.

        Args:
            own: the memory that the model's own outputs lie in.
            makers: of all memory that the graph makes: the node that made it.
        """
        node, tensor = self.node if self.node is not None else self.at, self.tensor
        shared = alone = False
        if tensor is not None:
            memory = storage_of(tensor)
            shared = memory in own
            # Of a part of something, the strides reach the rest.
            whole = makers.get(memory) is node
            alone = whole and tensor.untyped_storage().nbytes() == tensor.nbytes
        return SigmaNode(node, self.at, self.node is not None, self.copied, shared, alone)


class NodeAliases(Aliases):
    """Notes which node a tensor comes from, and holds no memory."""

    def __init__(self) -> None:
        super().__init__()
        self.now: fx.Node | None = None
        self.nodes: dict[int, tuple[Tensor, int, fx.Node]] = {}

    def made(self, value: Any, node: fx.Node) -> None:
        """A node has given a tensor, or written to it."""
        for tensor in tensors_in(value):
            self.nodes[id(tensor)] = (tensor, version_of(tensor), node)

    def note(self, tensor: Tensor) -> NodeHeld:
        """Where the tensor, as it is now, is to be read."""
        assert self.now is not None
        found = self.nodes.get(id(tensor))
        known = found is not None and found[1] == version_of(tensor)
        return NodeHeld(tensor, found[2] if found is not None and known else None, self.now)


class GraphRecord(Record):
    """Holds where a map is to be read."""

    def __init__(
        self,
        names: Names,
        wants: Selection,
        noted: NodeAliases,
        miss: Callable[[str, str], None],
    ) -> None:
        super().__init__(wants, Pass(0), LabelTable(names), noted, None, miss)
        self.graph = False  # what the graph returns is part of it
        self.names = names
        self.noted = noted  # which node each tensor comes from

    def copy(self, tensor: Tensor) -> StoredTensor:
        held = self.noted.note(tensor)
        held.copied = True
        return held

    def taken(
        self, held: StoredTensor, axes: ChannelLayout | None, picked: tuple[int, ...]
    ) -> StoredTensor:
        return held  # its filters are taken when the graph has run

    def output(self, module: nn.Module, name: str, output: Any) -> None:
        if module is not self.names.model:  # that is held when it has returned
            self.miss(name, Reason.OUTPUT_INSIDE_GRAPH.text())


class GraphTrace(PassTrace):
    """Where a graph is: Python runs it, and not the model."""

    def past_hooks(self, at: FrameType | None, entered: nn.Module | None = None) -> None:
        pass  # its functions are not called by the model

    def running(self) -> nn.Module:
        return self.frames[-1].module


class GraphTracer(Tracer):
    """The tracer of eager passes, on a graph: it labels, and holds where to read."""

    eager = False

    def __init__(self, names: Names, wants: Selection, miss: Callable[[str, str], None]) -> None:
        self.noted = NodeAliases()
        trace = GraphTrace(names, GraphRecord(names, wants, self.noted, miss))
        trace.learning = 1  # every module is in `frames`
        super().__init__(trace, None)
