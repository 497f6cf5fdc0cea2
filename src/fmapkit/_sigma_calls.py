"""One nonlinearity, called as a function in a traced pass: before it runs, and after."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from fmapkit._candidates import is_torchs
from fmapkit._events import Event
from fmapkit._flow import past_sigma, sigma_axes
from fmapkit._frames import SigmaCall
from fmapkit._functions import Function, out_of_place
from fmapkit._in_place import is_alone, with_new_memory
from fmapkit._nested import tensors_in
from fmapkit._origin import STOP, Flow
from fmapkit._store import storage_of
from fmapkit._transforms import TRANSFORMED, wrapped

if TYPE_CHECKING:
    from fmapkit._trace import Tracer

__all__ = ["after_sigma", "before_sigma"]

IN_A_HOOK = (
    "a hook on it applies another nonlinearity ({sigma}) to its result, whose maps are missing"
)


def before_sigma(tracer: Tracer, known: Function, func: Any, args: Any, kwargs: Any) -> SigmaCall:
    """A nonlinearity is about to run: hold its operand, and say what is to run.

    In place, z keeps its memory where it can (see `_in_place.py`); else it is copied.
    """
    frame = tracer.frames[-1]
    z = tensors_in(*args, kwargs)[0]
    call = SigmaCall(func, args, kwargs, z, tracer.tag(z))
    in_place = known.in_place or known.asked_in_place(args, kwargs)
    quiet = frame.kind == "sigma" or tracer.opaque > 0
    if frame.kind == "sigma" and frame.a is not None and is_torchs(frame.module):
        tracer.miss(tracer.names.of(frame.module), IN_A_HOOK.format(sigma=known.sigma))
    if wrapped(z):
        quiet = True
        tracer.miss(tracer.names.of(frame.module), TRANSFORMED)
    if tracer.editor and not quiet and known.sigma is not None:
        own = f"{tracer.names.of(frame.module)}:{known.sigma}"
        tracer.editor.before(call, own, known.sigma, in_place)
        if call.site is not None:
            call.held = tracer.aliases.reference(z)
            return call
    if "out" in kwargs:
        targets = tensors_in(kwargs["out"])
        call.in_place = any(target is z for target in targets)
    elif in_place:
        targets = [z]
        call.in_place = True
        apart = _apart(tracer, func, args, kwargs, z)
        if apart is not None:
            call.held = tracer.aliases.reference(z)
            call.function, call.kept = apart, True
            return call
    else:
        targets = []
    for target in targets:
        tracer.aliases.before_write(target)
    if not quiet and call.in_place:
        call.held = tracer.record.copy(z)
    elif not quiet:
        call.held = tracer.aliases.reference(z)
    return call


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
    flow = call.tag if isinstance(call.tag, Flow) else STOP
    if frame.watched:
        tracer.follow(known.name, [z], out, nonlinear=True)
    tracer.set_tag(out, past_sigma(call.tag, z, a))
    if call.kept and z is frame.x:
        frame.kept = True
    if call.in_place and z is frame.x:
        frame.in_place = True
    if frame.kind == "sigma" and z is frame.x:
        frame.a = a
    quiet = frame.kind == "sigma" or tracer.opaque > 0
    if call.held is None or quiet or not isinstance(a, Tensor):
        return out
    scope = tracer.scope()
    event = Event("sigma", scope, call.original)
    event.sigma = known.sigma
    event.kept = call.kept
    event.in_place = call.in_place
    if z is frame.x:
        event.x, event.y, event.key = z, a, frame.key
    own = f"{tracer.names.of(scope)}:{known.sigma}"
    if call.site is not None and tracer.editor is not None:
        out = tracer.editor.after(call.site, a, sigma_axes(flow.axes, z, a))
    tracer.record.sigma(event, flow, call.held, z, a, own, call.site)
    tracer.spare(event)
    if call.site is not None:
        tracer.set_tag(out, tracer.tag(a))
    elif tracer.learning and not event.in_place and not tracer.wants.gradients:
        tracer.firings.between(event, z, a)
    return out
