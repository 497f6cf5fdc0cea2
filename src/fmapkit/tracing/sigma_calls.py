"""One nonlinearity, called as a function in a traced pass: before it runs, and after."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fmapkit.nonlinearities import is_call_of, is_torchs
from fmapkit.provenance import (
    SOMETIMES,
    STOP,
    ChannelLabel,
    Function,
    FunctionCall,
    chooses_unseen,
    operand_of_sigma,
    out_of_place,
    past_sigma,
    sigma_axes,
)
from fmapkit.reasons import Reason
from fmapkit.storage import unheld
from fmapkit.torchlib.in_place import is_alone, with_new_memory
from fmapkit.torchlib.nested import tensors_in
from fmapkit.torchlib.transforms import wrapped
from fmapkit.tracing.events import Event
from fmapkit.tracing.frames import SigmaCall
from fmapkit.tracing.layer_edits import LayerEdits
from fmapkit.tracing.pass_trace import PassTrace


class SigmaCalls:
    """The nonlinearities of one pass that are called as functions."""

    def __init__(self, trace: PassTrace, editor: LayerEdits | None) -> None:
        self._trace = trace
        self._editor = editor

    def of(self, known: Function, func: Any, args: Any, kwargs: Any) -> SigmaCall | None:
        """A function is about to run: what it is as a nonlinearity; None if this call is none."""
        trace = self._trace
        if known.sigma is not None:
            z = tensors_in(*args, kwargs)[0]
            return SigmaCall(func, args, kwargs, known.sigma, z, trace.labels.of(z))
        if known.name not in SOMETIMES or trace.frames[-1].kind == "sigma":
            return None
        given = FunctionCall(known.name, func, args, kwargs, None, tensors_in(*args, kwargs))
        asked = given, trace.labels.of, trace.frames[-1].pointwise
        found = operand_of_sigma(*asked)
        if found is None:
            unseen = chooses_unseen(*asked)
            if unseen is not None:
                trace.miss_of_part(
                    unseen.origin.name, Reason.COMPARED_BY_HAND.text(function=known.name)
                )
            return None
        place = next(i for i, t in enumerate(given.operands) if t is found)
        return SigmaCall(func, args, kwargs, known.name, found, trace.labels.of(found), place)

    def before(self, known: Function, call: SigmaCall, watched: bool) -> None:
        """A nonlinearity is about to run: hold its operand, and say what is to run.

        In place, z keeps its memory where it can (see `torchlib/in_place.py`); else it is copied.
        Where somebody else watches, what runs is to be what the model has it.
        """
        trace, aliases = self._trace, self._trace.record.aliases
        frame, z = trace.frames[-1], call.z
        func, args, kwargs = call.function, call.args, call.kwargs
        in_place = known.in_place or known.asked_in_place(args, kwargs)
        hidden = trace.hidden()
        quiet = frame.kind == "sigma" or trace.opaque > 0 or hidden is not None
        if hidden is not None and self._editor:
            self._editor.refuse_hidden(call.label, hidden)
        if frame.kind == "sigma" and frame.a is not None and is_torchs(frame.module):
            trace.miss_here(Reason.SIGMA_IN_A_HOOK.text(sigma=call.sigma))
        call.unheld = unheld(z)
        if call.unheld is not None:
            quiet = True
            trace.miss_here(call.unheld)
        if self._editor and not quiet:
            own = trace.own_name(frame.module, call.sigma)
            self._editor.before(call, own, in_place)
            if call.site is not None:
                call.held = aliases.reference(z)
                return
        if "out" in kwargs:
            targets = tensors_in(kwargs["out"])
            call.in_place = any(target is z for target in targets)
        elif in_place and known.sigma is None:
            targets = list(known.writes(args, kwargs))
            call.in_place = any(target is z for target in targets)
        elif in_place:
            targets = [z]
            call.in_place = True
            apart = None if watched else self._apart(func, args, kwargs, z)
            if apart is not None:
                call.held = aliases.reference(z)
                call.function, call.kept = apart, True
                return
        else:
            targets = []
        for target in targets:
            aliases.before_write(target, leads_on=target is z)
        if not quiet and call.in_place:
            call.held = trace.record.copy(z)
        elif not quiet:
            call.held = aliases.reference(z)

    def _apart(self, func: Any, args: Any, kwargs: Any, z: Tensor) -> Any:
        """The same σ into new memory, which becomes z's; None where z cannot be given any."""
        aliases = self._trace.record.aliases
        if self._trace.opaque or not aliases.detach or aliases.gradients or wrapped(z):
            return None
        if not is_alone(z, sum(held.own for held in aliases.of(z))):
            return None
        other = out_of_place(func, args, kwargs)
        if other is None:
            return None
        function, its_args, its_kwargs = other
        aliases.wrote(z)  # where z cannot be given other memory, it will be

        def run(*given: Any, **named: Any) -> Any:
            for held in aliases.of(z):
                held.own_memory()
            if with_new_memory(z, lambda: function(*its_args, **its_kwargs)):
                aliases.forget(z)
                aliases.wrote(z)
                return z
            aliases.before_write(z)
            return func(*args, **kwargs)

        return run

    def after(self, known: Function, call: SigmaCall, out: Any) -> Any:
        """It has run: what it is to return."""
        trace = self._trace
        frame, z, a = trace.frames[-1], call.z, out
        channels = call.label if isinstance(call.label, ChannelLabel) else STOP
        operands = [z] if known.sigma is not None else tensors_in(*call.args, call.kwargs)
        given = known.name, call.function, call.args, call.kwargs, out
        trace.follow(FunctionCall(*given, operands), nonlinear=True)
        if call.unheld is None:
            trace.labels.put(a, past_sigma(call.label, z, a))
        if call.kept and z is frame.x:
            frame.kept = True
        if call.in_place and z is frame.x:
            frame.in_place = True
        if frame.kind == "sigma" and is_call_of(frame.module, call.original):
            frame.ran = True
            frame.a = a if z is frame.x else frame.a
        elif frame.kind == "sigma" and z is frame.x:
            frame.inner = call.sigma, a
        quiet = frame.kind == "sigma" or trace.opaque > 0
        if call.held is None or quiet or not isinstance(a, Tensor):
            return out
        scope = trace.scope()
        event = Event(
            "sigma",
            scope,
            call.original,
            place=call.place,
            sigma=call.sigma,
            in_place=call.in_place,
            kept=call.kept,
            **frame.passed(z, a),
        )
        own = trace.own_name(scope, call.sigma)
        if call.site is not None and self._editor is not None:
            out = self._editor.after(call.site, a, sigma_axes(channels.axes, z, a))
        trace.record.sigma(event, channels, call.held, z, a, own, call.site)
        trace.spare(event)
        if call.site is not None:
            trace.labels.put(out, trace.labels.of(a))
        return out
