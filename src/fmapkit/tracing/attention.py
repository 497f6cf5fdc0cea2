"""Attention probabilities in a traced pass: which softmax is one, and those of fused attention.

Eager attention is found by what is done with it: the result of a softmax that then weighs other
data in a matrix product, summed over the axis that it was taken along. On the way it may be cast,
masked, dropped out, reshaped and permuted. Which axis counts heads is told by the data, too: the
query's filters lie along two axes, heads and what is in a head, and the product keeps the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fmapkit.provenance import (
    MATMULS,
    ChannelAxis,
    ChannelLabel,
    ChannelLayout,
    FunctionCall,
    Heads,
    Origin,
    ParamLabel,
    Projection,
    argument,
    einsum_terms,
    given,
    probabilities,
    projection,
    propagate,
    words,
)
from fmapkit.reasons import Reason
from fmapkit.storage import StoredTensor
from fmapkit.torchlib.memory import version_of
from fmapkit.torchlib.nested import tensors_in
from fmapkit.torchlib.sharded import is_wrapped
from fmapkit.torchlib.transforms import is_shapeless, wrapped
from fmapkit.tracing.events import Event
from fmapkit.tracing.label_table import LabelTable
from fmapkit.tracing.pass_trace import PassTrace

FUSED = words(
    """_scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention
    _scaled_dot_product_cudnn_attention _scaled_dot_product_flash_attention_for_cpu
    _scaled_dot_product_fused_attention_overrideable _scaled_dot_product_attention_math
    _flash_attention_forward _efficient_attention_forward flex_attention
    _transformer_encoder_layer_fwd _native_multi_head_attention varlen_attn"""
)


_Made = tuple[Projection | None, Projection | None]


@dataclass(slots=True, eq=False)
class _Softmax:
    """The result of a softmax, which may turn out to be attention probabilities."""

    held: StoredTensor
    axes: ChannelLayout | None  # of heads
    made: _Made  # its queries and keys
    modules: set[nn.Module]  # in which it went on
    done: bool = False


class AttentionWatch:
    """Finds attention probabilities in one pass, and holds them."""

    def __init__(self, trace: PassTrace) -> None:
        self._trace = trace
        self._merged: int | None = None  # heads that lie along the first axis, with samples
        # What tensors are made of, and along which axis that lies.
        self._heads, self._keys = LabelTable(trace.names), LabelTable(trace.names)
        self._softmaxes: dict[Origin, _Softmax] = {}
        self._made: dict[Origin, _Made] = {}  # queries and keys of scores

    def end(self) -> None:
        """Let go of all that could keep a tensor alive."""
        self._heads.end()
        self._keys.end()
        self._softmaxes.clear()

    @contextmanager
    def inside(self, args: Any, kwargs: Any) -> Iterator[None]:
        """In `multi_head_attention_forward`, which puts heads and samples along one axis."""
        before, self._merged = self._merged, argument(args, kwargs, 4, "num_heads")
        try:
            yield
        finally:
            self._merged = before

    def step(self, call: FunctionCall) -> None:
        """A function has run."""
        name, out = call.name, call.out
        if name == "scaled_dot_product_attention":
            self._fused(call)
        elif name in FUSED:
            self._trace.record.miss(self._name(), Reason.FUSED_ATTENTION.text(function=name))
        elif not isinstance(out, Tensor) or is_shapeless(out) or wrapped(out):
            return
        elif name in ("softmax", "_softmax"):
            self._softmax(call)
        elif name in MATMULS or name == "einsum":
            self._product(name, call.operands, call.args, out)
        else:
            for table in (self._heads, self._keys):
                self._follow(table, call)

    def _name(self) -> str:
        return self._trace.names.of(self._trace.scope())

    # -- what goes on -------------------------------------------------------------------------

    def _follow(self, table: LabelTable, call: FunctionCall) -> None:
        if not any(map(table.channels, call.operands)):
            return
        found = propagate(call, table.channels)
        if isinstance(found, ChannelLabel) and found.axes is not None and found.axes.parts:
            table.put(call.out, found)
            known = self._softmaxes.get(found.origin)
            if known is not None:
                known.modules.update(f.module for f in self._trace.frames)

    # -- eager --------------------------------------------------------------------------------

    def _product(self, name: str, operands: Sequence[Tensor], args: Any, out: Tensor) -> None:
        """A product: of queries and keys, or of probabilities and values."""
        a, b = operands[-2:] if name != "__rmatmul__" else operands[-2:][::-1]
        if len(operands) < 2 or any(
            isinstance(self._trace.labels.of(x), ParamLabel) for x in (a, b)
        ):
            return
        for x, other in ((a, b), (b, a)):
            channels = self._keys.channels(x)
            if channels is None or channels.axes is None or channels.axes.dim is None:
                continue
            if channels.axes.dim == _summed(name, x, a, args):
                self._confirm(self._softmaxes[channels.origin], other)
        label = self._trace.labels.of(a)
        heads = _heads_of(label.axes if isinstance(label, ChannelLabel) else None, a)
        if heads is not None:
            dim = _place_in_product(name, heads.dim, a, args, out)
            if dim is not None and out.shape[dim] == heads.size:
                origin, axes = Origin("heads"), ChannelLayout.single(dim, heads.size)
                self._heads.put(out, ChannelLabel(origin, axes))
                keys = projection(self._trace.labels.of(b), b.shape)
                self._made[origin] = projection(label, a.shape), keys

    def _softmax(self, call: FunctionCall) -> None:
        scores, out, dim = call.operands[0], call.out, call.argument(1, "dim")
        if not isinstance(dim, int) or out.dim() < 2:
            return
        trace = self._trace
        channels = self._heads.channels(scores)
        heads = (
            channels.axes
            if channels is not None and channels.axes and channels.axes.fit(out.shape)
            else None
        )
        made = self._made[channels.origin] if channels is not None else (None, None)
        if dim % out.dim() == out.dim() - 2:  # the keys are those of the first factor
            made = made[::-1]
        origin, running = Origin("softmax"), {f.module for f in trace.frames}
        held = trace.record.aliases.reference(out)
        self._softmaxes[origin] = _Softmax(held, heads, made, running)
        axes = ChannelLayout.single(dim % out.dim(), out.shape[dim])
        self._keys.put(out, ChannelLabel(origin, axes))

    def _confirm(self, known: _Softmax, values: Tensor) -> None:
        """It weighs other data: these are attention probabilities."""
        trace = self._trace
        trace.deciding.update(known.modules, (f.module for f in trace.frames))
        if known.done:
            return
        known.done = True
        held, axes = known.held, known.axes
        p = held.tensor
        if p is not None and self._merged and axes is None and p.dim() == 3:
            if p.shape[0] % self._merged == 0:
                apart = p.view(-1, self._merged, *p.shape[1:])
                held = StoredTensor(apart, held.version, held.copied, held.gradient)
                trace.record.aliases.watch(held)
                axes = ChannelLayout.single(1, self._merged)
        made = projection(trace.labels.of(values), values.shape)
        self._hold(held, axes, Heads(*known.made, made))

    # -- fused --------------------------------------------------------------------------------

    def _fused(self, ran: FunctionCall) -> None:
        trace = self._trace
        name = self._name()
        trace.deciding.update(f.module for f in trace.frames)
        if not trace.wants.layer(name):
            return
        call = given(ran.args, ran.kwargs)
        odd = [t for t in ran.operands if is_shapeless(t) or wrapped(t) or is_wrapped(t)]
        if odd:
            trace.record.miss(
                name,
                Reason.ATTENTION_OF_WRAPPED.text(
                    function="scaled_dot_product_attention", kind=type(odd[0]).__name__
                ),
            )
            return
        found = probabilities(call, graph=not trace.wants.detach)
        if trace.wants.gradients:
            trace.record.miss(name, Reason.ATTENTION_WITHOUT_GRADIENT.text())
        heads = ChannelLayout.single(found.dim() - 3, found.shape[-3]) if found.dim() > 2 else None
        made = [
            projection(trace.labels.of(call[n]), call[n].shape) for n in ("query", "key", "value")
        ]
        held = StoredTensor(found, version_of(found), copied=True)
        self._hold(held, heads, Heads(*made))

    def _hold(self, held: StoredTensor, axes: ChannelLayout | None, heads: Heads) -> None:
        trace, scope = self._trace, self._trace.scope()
        name = trace.names.of(scope)
        origin = trace.record.next_call("attention", name, f"{name}@attention")
        if not trace.wants.layer(name):
            return
        event = Event("attention", scope, origin=origin, y_held=held)
        trace.record.hold(event, "y", "attention", held, axes)
        for _, entry in event.entries:
            entry.heads = heads
        trace.record.events.append(event)


def _heads_of(axes: ChannelLayout | None, x: Tensor) -> ChannelAxis | None:
    """The axis of heads, where filters lie along it and along the last one, which is summed."""
    if axes is None or len(axes.parts) != 2 or not axes.fit(x.shape):
        return None
    first, last = axes.parts
    return first if last.dim == x.dim() - 1 and first.dim < x.dim() - 2 else None


def _summed(name: str, x: Tensor, first: Tensor, args: Any) -> int | None:
    """The axis of a factor that a product sums over."""
    if name == "einsum":
        terms, right = einsum_terms(args)
        factors = tensors_in(*args[1:])
        term = next((t for t, f in zip(terms, factors, strict=False) if f is x), "")
        gone = [i for i, letter in enumerate(term) if letter not in right]
        return gone[0] if len(gone) == 1 else None
    return x.dim() - 1 if x is first else x.dim() - 2


def _place_in_product(name: str, dim: int, x: Tensor, args: Any, out: Tensor) -> int | None:
    """Where an axis of the first factor lies in the result."""
    if name == "einsum":
        terms, right = einsum_terms(args)
        if not terms or dim >= len(terms[0]) or right.count(terms[0][dim]) != 1:
            return None
        return right.index(terms[0][dim])
    return dim + out.dim() - x.dim()
