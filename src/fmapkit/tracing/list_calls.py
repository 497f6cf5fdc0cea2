"""A function on lists of tensors in a traced pass: what it makes of each, and what is not captured.

Labels go on as if the function on one tensor had been called for each. Where that would have been a
nonlinearity or a layer, there is no call that a tap could read, and `missed` says so.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fmapkit.provenance import (
    SOMETIMES,
    STOP,
    FunctionCall,
    Lookup,
    describe,
    each_call,
    operand_of_sigma,
    past_sigma,
    seen_by_each,
    weighs,
    weight_operand,
)
from fmapkit.reasons import Reason
from fmapkit.tracing.pass_trace import PassTrace


def step(
    trace: PassTrace, whole: FunctionCall, goes_on: Callable[[FunctionCall, Lookup], None]
) -> None:
    """A function on lists of tensors has run.

    Args:
        trace: of the pass.
        whole: its call.
        goes_on: labels what a call that makes no map has returned.
    """
    calls = each_call(whole)
    tag = seen_by_each(whole, trace.labels.of)
    for call in calls:
        z = _operand(trace, call, tag)
        if z is not None:
            _name(trace, whole, call)
            found = past_sigma(tag(z), z, call.out)
            trace.follow(call, nonlinear=True)
            trace.labels.put(call.out, found)
        elif weighs(call.name) and weight_operand(call, tag) is not None:
            _name(trace, whole, call)
            trace.follow(call)
            trace.labels.put(call.out, STOP)
        else:
            goes_on(call, tag)
            if _reduces(call):  # to one number, whatever the rule of its name takes the rest for
                trace.labels.put(call.out, STOP)
            trace.follow(call)


def _operand(trace: PassTrace, call: FunctionCall, tag: Lookup) -> Tensor | None:
    """What a call receives as a nonlinearity: z; None if it is none."""
    if describe(call.function).sigma is not None:
        return call.operands[0]
    frame = trace.frames[-1]
    if call.name not in SOMETIMES or frame.kind == "sigma":
        return None
    given = call.name, call.args, call.kwargs, tag, frame.pointwise
    return operand_of_sigma(*given, written=call.out)


def _reduces(call: FunctionCall) -> bool:
    axes: int = call.out.dim()
    return axes < max(operand.dim() for operand in call.operands)


def _name(trace: PassTrace, whole: FunctionCall, call: FunctionCall) -> None:
    """Maps of one element are missing, unless they are parts of another nonlinearity, or layer."""
    if trace.frames[-1].kind == "sigma" or trace.opaque:
        return
    function = f"torch.{getattr(whole.function, '__name__', whole.name)}"
    text = Reason.ON_LISTS.text(function=function, name=call.name)
    trace.miss_of_part(trace.names.of(trace.frames[-1].module), text)
