"""torch's functions on lists of tensors in a traced pass: as many calls of one on one tensor.

torch names each after that function (`torch._foreach_mul_` is `mul_` of each), and derives its
gradient from it by that name. Labels go on as if that function had been called for each. Where that
would have been a nonlinearity or a layer, there is no call that a tap could read, and `missed` says
so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fmapkit.provenance import (
    ON_LISTS,
    SOMETIMES,
    STOP,
    ChannelLabel,
    FunctionCall,
    Label,
    Lookup,
    describe,
    operand_of_sigma,
    past_sigma,
    weighs,
    weight_operand,
)
from fmapkit.reasons import Reason
from fmapkit.torchlib.nested import tensors_in
from fmapkit.tracing.pass_trace import PassTrace

# Of one tensor and a number, these go by other names.
_WITH_NUMBER = {"maximum": "clamp_min", "minimum": "clamp_max"}


def step(
    trace: PassTrace, whole: FunctionCall, goes_on: Callable[[FunctionCall, Lookup], None]
) -> None:
    """A function on lists has run; `goes_on` labels what a call that makes no map has returned."""
    calls = _each_call(whole)
    label = _seen_by_each(whole, trace.labels.of)
    for call in calls:
        z = _operand(trace, call, label)
        if z is not None:
            _name(trace, whole, call)
            found = past_sigma(label(z), z, call.out)
            trace.follow(call, nonlinear=True)
            trace.labels.put(call.out, found)
        elif weighs(call.name) and weight_operand(call, label) is not None:
            _name(trace, whole, call)
            trace.follow(call)
            trace.labels.put(call.out, STOP)
        else:
            goes_on(call, label)
            # To one number, whatever the rule of its name takes the rest for.
            if call.out.dim() < max(operand.dim() for operand in call.operands):
                trace.labels.put(call.out, STOP)
            trace.follow(call)


def _operand(trace: PassTrace, call: FunctionCall, label: Lookup) -> Tensor | None:
    """What a call receives as a nonlinearity: z; None if it is none."""
    if describe(call.function).sigma is not None:
        return call.operands[0]
    frame = trace.frames[-1]
    if call.name not in SOMETIMES or frame.kind == "sigma":
        return None
    return operand_of_sigma(call, label, frame.pointwise)


def _name(trace: PassTrace, whole: FunctionCall, call: FunctionCall) -> None:
    """Maps of one element are missing, unless they are parts of another nonlinearity, or layer."""
    if trace.frames[-1].kind == "sigma" or trace.opaque:
        return
    function = f"torch.{getattr(whole.function, '__name__', whole.name)}"
    text = Reason.ON_LISTS.text(function=function, name=call.name)
    trace.miss_of_part(trace.names.of(trace.frames[-1].module), text)


def _each_call(call: FunctionCall) -> list[FunctionCall]:
    """The calls that a call on lists stands for: the i-th has what lies at i in each list.

    What is no list goes to each of them, and what such a function has written to in place is what
    it has returned.
    """
    given = (*call.args, *call.kwargs.values())
    lists = [value for value in given if isinstance(value, (tuple, list))]
    out = call.out
    if not isinstance(out, (tuple, list)):  # it has written to its operands, or to what `out` is
        out = call.kwargs.get("out", call.kwargs.get("self", lists[0] if lists else ()))
    name = call.name.removeprefix(ON_LISTS)
    calls = []
    for i, result in enumerate(out):
        args = [_at(value, i) for value in call.args]
        kwargs = {key: _at(value, i) for key, value in call.kwargs.items()}
        operands = tensors_in(*args, {k: v for k, v in kwargs.items() if k != "out"})
        if len(operands) == 1:
            name = _WITH_NUMBER.get(name, name)
        function = getattr(torch, name, call.function)
        calls.append(FunctionCall(name, function, args, kwargs, result, operands))
    return calls


def _seen_by_each(call: FunctionCall, label: Lookup) -> Lookup:
    """What tensors carry, as each of the calls is to see it that a call on lists stands for.

    Of a tensor that has a number for each of them, none of them gets an axis.
    """
    given = (*call.args, *call.kwargs.values())
    numbers = [value for value in given if isinstance(value, Tensor) and value.dim()]
    if not numbers:
        return label

    def seen(value: Any) -> Label:
        found = label(value)
        shared = isinstance(found, ChannelLabel) and any(value is n for n in numbers)
        return STOP if shared else found

    return seen


def _at(value: Sequence[Any] | Any, place: int) -> Any:
    return value[place] if isinstance(value, (tuple, list)) else value
