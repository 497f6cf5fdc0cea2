"""One layer that has run in a traced pass: whose weight it took, and how its filters lie."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

from torch import Tensor, nn

from fmapkit import layers
from fmapkit.model import Use
from fmapkit.provenance import (
    PACKED,
    STOP,
    ChannelLabel,
    ChannelLayout,
    FunctionCall,
    Label,
    Made,
    OfModule,
    ParamLabel,
    Source,
    StandIns,
    bias_operand,
    filter_places,
    input_place,
    layer_axes,
    packed_axes,
    packed_key,
    pads_first,
    picked,
    source_of,
)
from fmapkit.reasons import Reason
from fmapkit.torchlib.memory import storage_of
from fmapkit.torchlib.nested import tensors_in
from fmapkit.torchlib.transforms import is_shapeless
from fmapkit.tracing.events import Event
from fmapkit.tracing.layer_edits import LayerEdits
from fmapkit.tracing.pass_trace import PassTrace


class LayerCalls:
    """The layers of one pass."""

    def __init__(self, trace: PassTrace, editor: LayerEdits | None) -> None:
        self._trace = trace
        self._editor = editor
        self.made: set[int] = set()  # memory of tensors that were made from nothing in this pass
        # Where a graph is traced: what stands for its inputs, and these.
        self.stand_ins: StandIns = {}

    # -- functions that take a weight ---------------------------------------------------------

    def weighed(self, call: FunctionCall, weight: Tensor) -> Tensor:
        """A function has run that is given a weight, one of its operands; what it is to return."""
        trace = self._trace
        scope, frame, label = trace.scope(), trace.frames[-1], trace.labels.of(weight)
        layer = trace.names.of_its_own(weight, frame.module)
        if layer is not None:
            whole, same_rows = True, True
        else:
            use = self._use(call.name, weight, label, scope)
            layer, same_rows = trace.names.layer_of(use)
            whole = use.is_module and weight.numel() == use.weight.numel()
        axes = layer_axes(call, weight, label)
        if axes is None and whole:
            axes = layer_axes(call, weight, None)
        if not same_rows:
            axes = None  # data may make, or pick, another weight each time
        if isinstance(label, ParamLabel) and label.by_value:
            trace.decides()
        place = input_place(call, weight)
        x = call.operands[place] if place is not None else None
        if frame.x is not None and frame.x is not x and pads_first(frame.module):
            x = frame.x
        seen = frame.passed(x, call.out)
        event = Event("layer", scope, call.function, place=place or 0, **seen)
        made, computed = self._made_of(call, weight, axes)
        return self.ran(event, layer, x, call.out, axes, made, computed)

    def packed(self, func: Any, args: Any, out: Tensor) -> Tensor:
        """A quantised layer has run, whose weight is no tensor; what it is to return."""
        trace = self._trace
        frame, x = trace.frames[-1], args[0]
        key = packed_key(frame.module, args[1])
        if key is None:
            trace.miss_here(Reason.WEIGHT_WITHOUT_NAME.text(function=func))
            trace.labels.put(out, STOP)
            return out
        event = Event("layer", trace.scope(), func, **frame.passed(x, out))
        name = f"{trace.names.of(frame.module)}.{key}".strip(".")
        return self.ran(event, name, x, out, packed_axes(func, out), Made(why=PACKED))

    def shapeless(self, function: str, weight: Any, out: Any) -> None:
        """A function has run on tensors that have no shape: whose filters they are is not told."""
        trace = self._trace
        if isinstance(weight, Tensor) and not trace.opaque:
            use = self._use(function, weight, trace.labels.of(weight), trace.scope())
            trace.record.miss(trace.names.layer_of(use)[0], Reason.NESTED_STRIDED.text())
        elif any(map(is_shapeless, tensors_in(out))):
            trace.miss_here(Reason.NESTED_STRIDED.text())
        for tensor in tensors_in(out):
            trace.labels.put(tensor, STOP)

    # -- any layer ----------------------------------------------------------------------------

    def ran(
        self,
        event: Event,
        name: str,
        x: Tensor | None,
        out: Tensor,
        axes: ChannelLayout | None,
        made: Made,
        computed: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """A layer has run: hold its maps; what it is to return.

        Args:
            made: what it made its filters of.
            computed: what of that is nowhere afterwards.
        """
        trace, editor = self._trace, self._editor
        origin = trace.record.layer(event, name, out, axes)
        origin.made = made
        if computed and trace.wants.weights and trace.wants.layer(name):
            reference = trace.record.aliases.reference
            origin.used = {what: reference(t) for what, t in computed.items()}
            trace.decides()  # to be seen in each pass
        edit = editor.response(name, origin.call, out, axes) if editor else None
        if trace.wants.layer(name):
            was = editor.modules.was(x) if editor and x is not None else None
            trace.record.layer_maps(event, x, out, None if edit is None else edit[1], was)
            trace.spare(event)
        return out if edit is None else edit[0]

    # -- whose weight -------------------------------------------------------------------------

    def _made_of(
        self, call: FunctionCall, weight: Tensor, axes: ChannelLayout | None
    ) -> tuple[Made, dict[str, Tensor]]:
        """What the layer made its filters of, and what of that is nowhere afterwards."""
        bias = bias_operand(call)
        used = {"weight": weight, **({"bias": bias} if isinstance(bias, Tensor) else {})}
        found = {what: self._source(tensor) for what, tensor in used.items()}
        self._trace.sources.extend(found.values())
        places = filter_places(call, weight)
        made = Made(found["weight"], found.get("bias"), tuple(places), axes)
        return made, {what: used[what] for what, s in found.items() if s.owner is None}

    def _source(self, tensor: Tensor) -> Source:
        """Where a layer got its weight, or its bias: nearly always, it is its module's own."""
        inner = self._trace.frames[-1].module
        for key, parameter in inner._parameters.items():
            if parameter is tensor:
                return Source(weakref.ref(inner), key, OfModule(inner, tensor))
        return source_of(tensor, self._trace.labels.of(tensor), self._owners, self.stand_ins)

    def _owners(self, tensor: Tensor) -> list[tuple[nn.Module, str]]:
        """The modules that have a parameter or buffer; the one that runs need not be registered."""
        found = self._trace.names.owners(tensor)
        if found:
            return found
        running = self._trace.running()
        own = [(running, key) for key, p in running._parameters.items() if p is tensor]
        return own or self._trace.names.owned_by(tensor)

    def _use(self, function: str, weight: Tensor, label: Label, scope: nn.Module) -> Use:
        """Whose weight is used here, as far as the pass can tell."""
        trace = self._trace
        frame, running = trace.frames[-1], trace.running()
        stack = [f.module for f in trace.frames]
        if running is not stack[-1]:
            stack.append(running)
        made_of = label.parameter if isinstance(label, ParamLabel) else weight
        source = label.origin.name if isinstance(label, ChannelLabel) else None
        turns = frame.turns = Counter() if frame.turns is None else frame.turns
        turn = turns[function, source]
        turns[function, source] += 1
        return Use(
            weight=made_of,
            picked=picked(function, label, weight) if isinstance(label, ParamLabel) else "",
            stack=stack,
            is_module=layers.layer_axis(running) is not None,
            scope=scope,
            function=function,
            made=storage_of(made_of) in self.made,
            source=source,
            turn=turn,
        )
