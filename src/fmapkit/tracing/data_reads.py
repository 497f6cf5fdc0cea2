"""Where a pass lets data decide: a function that gives Python a number, or a tensor its size.

A module that does so is traced in every pass; but not where what is read is known beforehand, of
numbers alone (`provenance/constants.py`) or of what a call is given (`input_reads.py`).
"""

from __future__ import annotations

import dis
import inspect
import sys
import types
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from fmapkit.paths import keeps_number, may_be_handled, only_raises, runs_own_code
from fmapkit.provenance import Constants, Function, FunctionCall, bounds_in, describe
from fmapkit.torchlib.nested import tensors_in
from fmapkit.tracing.input_reads import (
    InputRead,
    MadeTensors,
    is_cheap,
    sizes_are_data,
    sizes_given,
)
from fmapkit.tracing.pass_trace import PassTrace

# torch's own code that reads a number to compare it with a size, and raises if they differ.
_CHECKS_OF_SIZES = {
    id(nn.RNNBase.get_expected_hidden_size.__code__),
    id(nn.LSTM.get_expected_cell_size.__code__),
}


class DataReads:
    """Those of one pass.

    Attributes:
        made: the tensors that were made by cheap functions.
    """

    def __init__(self, trace: PassTrace) -> None:
        self._trace = trace
        self._constants = Constants(trace.record.aliases.written)
        self.made = MadeTensors(trace.record.aliases)

    def before(
        self,
        known: Function,
        func: Any,
        types: Any,
        args: Any,
        kwargs: dict[str, Any],
        asking: types.FrameType,
    ) -> InputRead | None:
        """Note where a function has to be seen in every pass: by its result, or by whom it runs.

        Args:
            types: classes of its arguments that have a `__torch_function__` of their own.
            asking: the frame that calls it.

        Returns:
            What it is of the inputs of the region that is recorded, if these alone tell its result.
        """
        trace, by_inputs = self._trace, None
        if not (types and any(map(runs_own_code, types))):
            if not known.reads or not known.reads(args, kwargs):
                return None
            # An index, or a size, decides how much there is of what it is asked of.
            deciding = args[1:] if known.indexed else args
            if self._constants.hold(tensors_in(*deciding, kwargs, *map(bounds_in, deciding))):
                return None
            if _decides_nothing(known.name, asking):
                return None
            if trace.region is not None and not _picked_in_c(known.name, asking):
                by_inputs = partial(self.made.of_inputs, known, func, args, kwargs)
        read = trace.decides(by_inputs)
        if read is not None and sizes_are_data(known.name):  # it makes tensors, which are followed
            trace.asked.append((read, sizes_given(known.name, func, args, kwargs)))
            return None
        return read

    def whether_zero(self, asked: list[Tensor]) -> None:
        """Note that numbers make a function a nonlinearity if they are zero; empties the list."""
        trace = self._trace
        for number in asked:
            if not self._constants.hold((number,)):
                by_inputs = None
                if trace.region is not None:
                    told: Any = describe(torch.is_nonzero), torch.is_nonzero, (number,), {}
                    by_inputs = partial(self.made.of_inputs, *told)
                read = trace.decides(by_inputs)
                if read is not None:
                    trace.asked.append((read, bool(number)))
        asked.clear()

    def after(self, known: Function, call: FunctionCall) -> None:
        """A function has run."""
        self._constants.made(call, known.in_place)
        if self._trace.learning and is_cheap(known.name) and self._trace.region is not None:
            self.made.add(known, call)


def _decides_nothing(name: str, asking: types.FrameType) -> bool:
    """Whether what a function reads is only kept, or decides no more than whether to raise."""
    if sys.version_info < (3, 11):  # bytecode does not tell what is handled, nor where it stands
        return False
    if id(asking.f_code) in _CHECKS_OF_SIZES:
        return not may_be_handled(asking)
    if name == "__bool__":
        return only_raises(asking) and not may_be_handled(asking)
    return keeps_number(asking)


def _picked_in_c(name: str, asking: types.FrameType) -> bool:
    """Whether `max` or its like asks, to give one thing or another: no path tells which.

    It asks for the truth of tensors itself, or for keys, by a function made where it is called.
    """
    if name == "__bool__" and _runs_picking(asking):
        return True
    around = asking.f_back if asking.f_code.co_flags & inspect.CO_NESTED else None
    return around is not None and _runs_picking(around)


def _runs_picking(frame: types.FrameType) -> bool:
    """Whether a call is under way in a function that calls such a builtin."""
    code = frame.f_code
    return dis.opname[code.co_code[frame.f_lasti]].startswith("CALL") and _picks(code)


@lru_cache(maxsize=1024)
def _picks(code: types.CodeType) -> bool:
    return any(
        one.argval in ("max", "min", "sorted") and one.opname.endswith(("_GLOBAL", "_NAME"))
        for one in dis.get_instructions(code)
    )
