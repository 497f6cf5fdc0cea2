"""Watch one pass, op by op, and know what ran, whose it is, and what gets overwritten.

The tracer is a `TorchFunctionMode`: it sees each torch function before it runs, above autograd and
whatever module it is called in. Hooks tell it which modules' calls begin and end. It knows of each
what it is, and hands it on:

    Tracer.__torch_function__ ─┬─ SigmaCalls.of, before, after   a nonlinearity called as a function
                               ├─ LayerCalls.weighed, packed     a layer
                               ├─ list_calls.step                a function on lists of tensors
                               ├─ propagate                      any other: labels go on
                               └─ AttentionWatch.step            attention probabilities
    Tracer.leave ────────────── ModuleCalls.enter, leave         what a module's call has been

Each of these writes to one `PassTrace`: the frames, the labels, and the `Record` of what ran.
"""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from fmapkit.editing import RequestedEdits
from fmapkit.missed import reason
from fmapkit.model import Names
from fmapkit.paths import unrecorded
from fmapkit.provenance import (
    MAY_COPY,
    NORM_AXIS,
    OPAQUE,
    RESHAPED_IN_PLACE,
    RESHAPES,
    STOP,
    ChannelLabel,
    Function,
    FunctionCall,
    Lookup,
    beside_numbers,
    describe,
    described,
    propagate,
    target_of,
    weight_operand,
)
from fmapkit.reasons import Reason
from fmapkit.selection import EarlyStop, Selection
from fmapkit.storage import Aliases, Pass
from fmapkit.torchlib.apart import is_operator, run
from fmapkit.torchlib.autograd import graph_task
from fmapkit.torchlib.in_place import someone_sees
from fmapkit.torchlib.memory import storage_of, version_of
from fmapkit.torchlib.modes import ObserverMode, compiling
from fmapkit.torchlib.nested import leaves, tensors_in
from fmapkit.torchlib.side_ops import looking
from fmapkit.torchlib.transforms import is_shapeless, some_shapeless, wrapped
from fmapkit.tracing import list_calls
from fmapkit.tracing.attention import AttentionWatch
from fmapkit.tracing.candidates import verdict
from fmapkit.tracing.data_reads import DataReads
from fmapkit.tracing.events import HookPoint
from fmapkit.tracing.frames import Frame, SigmaCall
from fmapkit.tracing.input_reads import InputRead
from fmapkit.tracing.label_table import LabelTable
from fmapkit.tracing.layer_calls import LayerCalls
from fmapkit.tracing.layer_edits import LayerEdits, exchanged
from fmapkit.tracing.module_calls import ModuleCalls
from fmapkit.tracing.pass_trace import PassTrace
from fmapkit.tracing.record import Record
from fmapkit.tracing.sigma_calls import SigmaCalls

# Classes of tensors that have no `__torch_function__` of their own.
_TORCHS = frozenset({Tensor, nn.Parameter})
# Have no shape yet: a lazy module is just making its weights.
_LAZY = (UninitializedParameter, UninitializedBuffer)


class Tracer(ObserverMode):
    """Sees one pass; see the module's docstring."""

    eager = True  # it sees what runs, and not what torch.compile traces

    def __init__(self, trace: PassTrace, edits: RequestedEdits | None) -> None:
        super().__init__()
        self.trace = trace
        self.editor: LayerEdits | None = None  # None where nothing is to be edited
        if edits:
            self.editor = LayerEdits(trace, edits, partial(_tried, trace.names, trace.wants))
        self.layers = LayerCalls(trace, self.editor)
        self.reads = DataReads(trace)
        self.modules = ModuleCalls(trace, self.editor, self.layers, self.reads)
        self.sigmas = SigmaCalls(trace, self.editor)
        # What we do ourselves is seen by no mode of others, and by no tensor's own code. But edits
        # are: they are part of what the model computes.
        self._looking: Callable[[], AbstractContextManager[Any]] = (
            looking if self.editor is None else nullcontext
        )
        self.attention = AttentionWatch(trace) if trace.wants.kind("attention") else None
        self.described = described()
        # A fault of our own, after which nothing is captured.
        self.failed: BaseException | None = None
        self.lost = False  # the pass has left the known paths
        # The region after whose exception no more was captured.
        self.broken: nn.Module | None = None

    @classmethod
    def of_pass(
        cls,
        names: Names,
        wants: Selection,
        edits: RequestedEdits | None,
        stop: EarlyStop | None,
        current: Pass,
        miss: Callable[[str, str], None],
        labels: LabelTable | None = None,
    ) -> Tracer:
        """A tracer of an eager pass; after compiled code, its tensors carry `labels` already."""
        labels = LabelTable(names) if labels is None else labels
        aliases = Aliases(wants.detach, wants.gradients, labels.lent)
        record = Record(wants, current, labels, aliases, stop, miss)
        return cls(PassTrace(names, record), edits)

    def end(self) -> None:
        """Let go of all that could keep a tensor or a graph alive, without waiting for Python's gc.

        The parts know the trace, and it knows none of them.
        """
        self.trace.end()
        if self.editor:
            self.editor.modules.end()
        if self.attention is not None:
            self.attention.end()

    def fail(self, error: BaseException) -> None:
        """A fault of our own: the rest of the pass is not captured, and `missed` says so."""
        if self.editor is not None and error is self.editor.edits.raised:
            raise error  # the user's own function
        if self.failed is None:
            self.failed = error
            trace = self.trace
            where = trace.names.of(trace.frames[-1].module) if trace.frames else ""
            trace.record.miss(where, reason(error))

    def give_up(self, broken: nn.Module | None = None) -> None:
        """What the tensors of the pass carry is not known any more: no more of it is captured.

        It may be for a region whose call an exception has ended; its caller may handle that.
        """
        self.lost = True
        self.broken = broken

    # -- every torch function -----------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        trace, kwargs = self.trace, kwargs or {}
        if self.eager and compiling():  # within a pass, a part of the model is exported, say
            return func(*args, **kwargs)
        known = self.described.get(func) or describe(func)
        others = types and not _TORCHS.issuperset(types)
        if (known.reads or others) and not trace.paused:
            read = self._read(known, func, types if others else (), args, kwargs)
            if read is not None:
                value = func(*args, **kwargs)
                trace.asked.append((read, value))
                return value
        if known.silent or trace.paused or self.failed or graph_task() != -1:
            return func(*args, **kwargs)
        if known.higher_order and is_operator(func, args, kwargs):
            return run(func, *args, **kwargs)
        if known.opened is not None:
            with self, self.attention.inside(args, kwargs) if self.attention else nullcontext():
                return known.opened(*args, **kwargs)
        if not trace.frames or (others and any(issubclass(kind, _LAZY) for kind in types)):
            return func(*args, **kwargs)
        sigma = None
        if not known.passive or "out" in kwargs:
            try:
                watched = someone_sees()
                with self._looking():
                    sigma = self._before(known, func, args, kwargs, watched)
            except Exception as error:  # ours, not the user's: named in `missed`, never raised
                self.fail(error)
                return func(*args, **kwargs)
            if sigma is not None:
                func, args, kwargs = sigma.function, sigma.args, sigma.kwargs
        out = func(*args, **kwargs)
        out = self._ran(known, sigma, (func, args, kwargs, out), sys._getframe(1))
        stop = trace.record.stop
        if stop is not None and not trace.learning:
            stop.check()
        return out

    def _ran(
        self, known: Function, sigma: SigmaCall | None, call: Any, caller: types.FrameType
    ) -> Any:
        """A function has run, with its arguments and what it gave; what it is to return."""
        trace, (func, args, kwargs, out) = self.trace, call
        asking = trace.record.hook_points.asking
        asking.append(caller)
        try:
            with self._looking():
                trace.past_hooks(caller)
                if not trace.learning and known.followed:
                    trace.hidden()
                if sigma is not None:
                    out = self.sigmas.after(known, sigma, out)
                else:
                    given = known.name, func, args, kwargs, out
                    out = self._after(known, FunctionCall(*given, tensors_in(*args, kwargs)))
        except Exception as error:  # ours, not the user's: named in `missed`, never raised
            self.fail(error)
        finally:
            asking.pop()
        return out

    def _read(
        self, known: Function, func: Any, types: Any, args: Any, kwargs: Any
    ) -> InputRead | None:
        """Note where a function has to be seen in every pass: see `DataReads.before`."""
        if known.indexed and not types and beside_numbers(args, kwargs):
            return None
        with self._looking():
            return self.reads.before(known, func, types, args, kwargs, sys._getframe(2))

    def _before(
        self, known: Function, func: Any, args: Any, kwargs: dict[str, Any], watched: bool
    ) -> SigmaCall | None:
        """A function is about to run: what it is as a nonlinearity; None if it is none."""
        sigma = None
        if known.sigma is not None or known.sometimes:
            sigma = self.sigmas.of(known, func, args, kwargs)
            self.reads.whether_zero(self.trace.frames[-1].pointwise.asked)
        if sigma is not None:
            self.sigmas.before(known, sigma, watched)
        elif not known.never_writes or "out" in kwargs:
            self.trace.before_writes(known, args, kwargs)
        return sigma

    def _after(self, known: Function, call: FunctionCall) -> Any:
        """A function has run that is no nonlinearity; what it is to return."""
        name, operands, out, trace = call.name, call.operands, call.out, self.trace
        if name in OPAQUE and trace.wants.any_inside(trace.frames[-1].module):
            trace.miss_here(OPAQUE[name])
        if known.fused and not trace.opaque:
            trace.miss_here(Reason.FUSED_QUANTIZED.text(function=call.function))
        one = isinstance(out, Tensor)
        if known.fresh and one:
            self.layers.made.add(storage_of(out))
        self.reads.after(known, call)
        if trace.learning and one and name in MAY_COPY:
            trace.record.aliases.note_copy(out, operands)
        if not operands:
            if known.followed or trace.frames[-1].watched:
                trace.follow(call)
            return out
        if self.attention is not None and not trace.opaque:
            self.attention.step(call)
        weight = weight_operand(call, trace.labels.of) if known.weighs else None
        if some_shapeless(operands) or (one and out.is_nested and is_shapeless(out)):
            self.layers.shapeless(name, weight, out)
            return out
        if known.on_lists:
            list_calls.step(trace, call, self._carry)
            return out
        if weight is None and not known.packed:
            self._goes_on(known, call)
        else:
            out = self._weighed(known, call, weight)
        if known.followed or trace.frames[-1].watched:
            trace.follow(call if out is call.out else replace(call, out=out))
        return out

    def _weighed(self, known: Function, call: FunctionCall, weight: Any) -> Any:
        """A function has run that may be a layer; what it is to return."""
        trace, out = self.trace, call.out
        seen = isinstance(out, Tensor) and not trace.opaque and not wrapped(out)
        if seen and isinstance(weight, Tensor) and trace.hidden() is None:
            return self.layers.weighed(call, weight)
        if seen and known.packed:
            return self.layers.packed(call.function, call.args, out)
        self._goes_on(known, call)
        return out

    def _goes_on(self, known: Function, call: FunctionCall) -> None:
        """A function has run that makes no map."""
        name, trace = call.name, self.trace
        if trace.learning and not trace.opaque and (known.weighs or known.sometimes):
            # Nothing this time; but who waits for what goes by this name will see it, too.
            trace.record.hook_points.append(HookPoint(None, trace.scope(), call.function))
        self._carry(call, trace.labels.of, known.in_place and name in RESHAPED_IN_PLACE)

    def _carry(self, call: FunctionCall, look_up: Lookup, reshaped: bool = False) -> None:
        """Labels go on through a function; if it has reshaped its operand in place, they stop."""
        name, out, trace = call.name, call.out, self.trace
        if reshaped:  # no rule is told what shape it had
            label = STOP if any(look_up(x) is not None for x in call.operands) else None
        else:
            label = propagate(call, look_up)
            if name in RESHAPES and trace.learning:
                self._at_stake(call, look_up)
        if (
            name in NORM_AXIS
            and isinstance(label, ChannelLabel)
            and label.origin.kind != "layer"
            and isinstance(out, Tensor)
        ):
            names = trace.names
            own = names.place(trace.running()) or names.of(trace.frames[-1].module)
            label = trace.record.norm(label, out, NORM_AXIS[name], own)
        if label is not None:
            target = target_of(name, call.args, call.kwargs)
            before = trace.labels.of(target) if target is not None else None
            if name == "__setitem__":
                trace.labels.put(call.args[0], label)
            trace.labels.put(out, label)
            if target is not None:
                trace.labels.written(target, before)

    def _at_stake(self, call: FunctionCall, look_up: Lookup) -> None:
        """Note by which sizes a reshape has kept the filters, or not."""
        x, out = call.operands[0], call.out
        label = look_up(x)
        if isinstance(label, ChannelLabel) and label.axes is not None and isinstance(out, Tensor):
            self.trace.mixed.extend(label.axes.at_stake(tuple(x.shape), tuple(out.shape)))

    def ran_apart(self, name: str, output: Any) -> None:
        """A function has run whose inside nobody sees: what comes out has no known label."""
        if self.failed or self.lost or not self.trace.frames:
            return
        for _, tensor in leaves(output):
            self.trace.labels.put(tensor, STOP)
        if self.attention is not None:
            self.attention.step(FunctionCall(name, None, (), {}, output, []))

    # -- modules ------------------------------------------------------------------------------

    def leave(self, module: nn.Module, output: Any) -> Any:
        """A forward has ended: what it is to return if something was edited; None for its own."""
        trace = self.trace
        if self.editor and all(f.module is not module for f in trace.frames):
            # An edit of its input has failed, and it has not begun; or nothing is told any more.
            return self.editor.modules.leave_lost(module, output) if self.lost else None
        frames, frame = trace.frames, None
        while frames and (frame is None or frame.module is not module):
            frame = trace.pop()  # several, where a forward caught an exception of a child
        if frame is None or frame.module is not module or self.failed:
            return None
        if self.lost and self.broken is None:  # nothing of the pass is kept, no output either
            return self.editor.modules.leave_lost(module, output) if self.editor else None
        return self.modules.leave(frame, output)


def _tried(names: Names, wants: Selection, frame: Frame) -> tuple[bool, bool]:
    """Whether a module written out by hand is one σ, and works in place: a copy of it tells."""
    module, x = copy.deepcopy(frame.module), frame.x
    for part in module.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    tracer = Tracer.of_pass(names, wants, None, None, Pass(-1), lambda *_: None)
    assert x is not None
    given = x.detach().clone()
    args, kwargs = exchanged(frame.args, frame.kwargs, x, given)
    cuda = [x.device.index] if x.device.type == "cuda" else []
    with unrecorded(), torch.random.fork_rng(devices=cuda):
        tracer.trace.labels.enter(args, kwargs)
        trial = tracer.modules.enter(module, args, kwargs)
        with torch._C._EnableTorchFunction(), tracer:
            output = module(*args, **kwargs)
        is_sigma = verdict(trial, output, tracer.trace.record) is not None
        return is_sigma, version_of(given) != 0
