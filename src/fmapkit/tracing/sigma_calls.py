"""One nonlinearity, called as a function in a traced pass: before it runs, and after."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from fmapkit.nonlinearities import is_call_of, is_torchs
from fmapkit.provenance import (
    SOMETIMES,
    STOP,
    ChannelLabel,
    Function,
    chooses_unseen,
    operand_of_sigma,
    out_of_place,
    past_sigma,
    sigma_axes,
)
from fmapkit.torchlib.in_place import is_alone, with_new_memory
from fmapkit.torchlib.memory import storage_of
from fmapkit.torchlib.nested import tensors_in
from fmapkit.torchlib.transforms import unheld, wrapped
from fmapkit.tracing.events import Event
from fmapkit.tracing.frames import SigmaCall

if TYPE_CHECKING:
    from fmapkit.tracing.tracer import Tracer

__all__ = ["after_sigma", "before_sigma", "sigma_call"]

IN_A_HOOK = (
    "a hook on it applies another nonlinearity ({sigma}) to its result, whose maps are missing"
)
UNSEEN = (
    "a nonlinearity of it is written by hand, by a comparison of what it computes: torch.{} "
    "chooses between values of it and is not given the one that was compared; in a module of its "
    "own it would be captured"
)


def sigma_call(
    tracer: Tracer, known: Function, func: Any, args: Any, kwargs: Any
) -> SigmaCall | None:
    """A function is about to run: what it is as a nonlinearity; None if this call is none."""
    if known.sigma is not None:
        z = tensors_in(*args, kwargs)[0]
        return SigmaCall(func, args, kwargs, known.sigma, z, tracer.tag(z))
    if known.name not in SOMETIMES or tracer.frames[-1].kind == "sigma":
        return None
    asked = known.name, args, kwargs, tracer.tag, tracer.frames[-1].pointwise
    found = operand_of_sigma(*asked)
    if found is None:
        unseen = chooses_unseen(*asked)
        if unseen is not None and all(frame.degrees is None for frame in tracer.frames):
            tracer.miss(unseen.origin.name, UNSEEN.format(known.name))
        return None
    call = SigmaCall(func, args, kwargs, known.name, found, tracer.tag(found))
    call.place = next(i for i, t in enumerate(tensors_in(*args, kwargs)) if t is found)
    return call


def before_sigma(tracer: Tracer, known: Function, call: SigmaCall) -> None:
    """A nonlinearity is about to run: hold its operand, and say what is to run.

    In place, z keeps its memory where it can (see `torchlib/in_place.py`); else it is copied.
    """
    frame, z = tracer.frames[-1], call.z
    func, args, kwargs = call.function, call.args, call.kwargs
    in_place = known.in_place or known.asked_in_place(args, kwargs)
    hidden = tracer.hidden()
    quiet = frame.kind == "sigma" or tracer.opaque > 0 or hidden is not None
    if hidden is not None and tracer.editor:
        tracer.editor.refuse_hidden(call.tag, hidden)
    if frame.kind == "sigma" and frame.a is not None and is_torchs(frame.module):
        tracer.miss(tracer.names.of(frame.module), IN_A_HOOK.format(sigma=call.sigma))
    call.unheld = unheld(z)
    if call.unheld is not None:
        quiet = True
        tracer.miss(tracer.names.of(frame.module), call.unheld)
    if tracer.editor and not quiet:
        own = tracer.own_name(frame.module, call.sigma)
        tracer.editor.before(call, own, in_place)
        if call.site is not None:
            call.held = tracer.aliases.reference(z)
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
        apart = _apart(tracer, func, args, kwargs, z)
        if apart is not None:
            call.held = tracer.aliases.reference(z)
            call.function, call.kept = apart, True
            return
    else:
        targets = []
    for target in targets:
        tracer.aliases.before_write(target, leads_on=target is z)
    if not quiet and call.in_place:
        call.held = tracer.record.copy(z)
    elif not quiet:
        call.held = tracer.aliases.reference(z)


def _apart(tracer: Tracer, func: Any, args: Any, kwargs: Any, z: Tensor) -> Any:
    """The same σ into new memory, which becomes z's; None where z cannot be given any."""
    aliases = tracer.aliases
    if tracer.opaque or not aliases.detach or aliases.gradients or wrapped(z):
        return None
    if not is_alone(z, sum(held.own for held in aliases.of(z))):
        return None
    other = out_of_place(func, args, kwargs)
    if other is None:
        return None
    function, its_args, its_kwargs = other
    aliases.written.add(storage_of(z))  # where z cannot be given other memory, it will be

    def run(*given: Any, **named: Any) -> Any:
        for held in aliases.of(z):
            held.own_memory()
        if with_new_memory(z, lambda: function(*its_args, **its_kwargs)):
            aliases.forget(z)
            aliases.written.add(storage_of(z))
            return z
        tracer.aliases.before_write(z)
        return func(*args, **kwargs)

    return run


def after_sigma(tracer: Tracer, known: Function, call: SigmaCall, out: Any) -> Any:
    """It has run: what it is to return."""
    frame = tracer.frames[-1]
    z, a = call.z, out
    flow = call.tag if isinstance(call.tag, ChannelLabel) else STOP
    operands = [z] if known.sigma is not None else tensors_in(*call.args, call.kwargs)
    tracer.follow(known.name, operands, call.args, call.kwargs, out, nonlinear=True)
    if call.unheld is None:
        tracer.set_tag(a, past_sigma(call.tag, z, a))
    if call.kept and z is frame.x:
        frame.kept = True
    if call.in_place and z is frame.x:
        frame.in_place = True
    if frame.kind == "sigma" and is_call_of(frame.module, call.original):
        frame.ran = True
        frame.a = a if z is frame.x else frame.a
    elif frame.kind == "sigma" and z is frame.x:
        frame.inner = call.sigma, a
    quiet = frame.kind == "sigma" or tracer.opaque > 0
    if call.held is None or quiet or not isinstance(a, Tensor):
        return out
    scope = tracer.scope()
    event = Event("sigma", scope, call.original)
    event.sigma, event.place = call.sigma, call.place
    event.kept = call.kept
    event.in_place = call.in_place
    if z is frame.x:
        event.x, event.y, event.key = z, a, frame.key
    own = tracer.own_name(scope, call.sigma)
    if call.site is not None and tracer.editor is not None:
        out = tracer.editor.after(call.site, a, sigma_axes(flow.axes, z, a))
    tracer.record.sigma(event, flow, call.held, z, a, own, call.site)
    tracer.spare(event)
    if call.site is not None:
        tracer.set_tag(out, tracer.tag(a))
    return out
