"""torch's functions on lists of tensors: as many calls of a function on one tensor.

torch names each after that function (`torch._foreach_mul_` is `mul_` of each), and derives its
gradient from it by that name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fmapkit.provenance.function_call import FunctionCall
from fmapkit.provenance.labels import STOP, ChannelLabel, Label, Lookup
from fmapkit.torchlib.nested import tensors_in

_PREFIX = "_foreach_"
# Of one tensor and a number, these go by other names.
_WITH_NUMBER = {"maximum": "clamp_min", "minimum": "clamp_max"}


def on_lists(name: str) -> bool:
    """Whether a function, told by its name, is one on lists."""
    return name.startswith(_PREFIX)


def each_call(call: FunctionCall) -> list[FunctionCall]:
    """The calls that a call on lists stands for: the i-th has what lies at i in each list.

    Args:
        call: of such a function (see `on_lists`), which has run.

    Returns:
        What is no list goes to each of them, and what such a function has written to in place is
        what it has returned.
    """
    given = (*call.args, *call.kwargs.values())
    lists = [value for value in given if _is_list(value)]
    out = call.out
    if not isinstance(out, (tuple, list)):  # it has written to its operands, or to what `out` is
        out = call.kwargs.get("out", call.kwargs.get("self", lists[0] if lists else ()))
    name = call.name.removeprefix(_PREFIX)
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


def seen_by_each(call: FunctionCall, tag: Lookup) -> Lookup:
    """What tensors carry, as each of the calls is to see it that a call on lists stands for.

    Of a tensor that has a number for each of them, none of them gets an axis.

    Args:
        call: on lists.
        tag: what a tensor carries.
    """
    given = (*call.args, *call.kwargs.values())
    numbers = [value for value in given if isinstance(value, Tensor) and value.dim()]
    if not numbers:
        return tag

    def seen(value: Any) -> Label:
        found = tag(value)
        shared = isinstance(found, ChannelLabel) and any(value is n for n in numbers)
        return STOP if shared else found

    return seen


def _is_list(value: Any) -> bool:
    return isinstance(value, (tuple, list))


def _at(value: Sequence[Any] | Any, place: int) -> Any:
    return value[place] if _is_list(value) else value
