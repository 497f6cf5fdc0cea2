"""Where a pass lets data decide: a function that gives Python a number, or a tensor its size.

A module that does so is traced in every pass; but not where what is read is known beforehand, of
numbers alone (`Constants`) or of what a call is given (`input_reads.py`).
"""

from __future__ import annotations

import dis
import inspect
import sys
import types
import weakref
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from fmapkit.paths import keeps_number, may_be_handled, only_raises, runs_own_code
from fmapkit.provenance import Function, FunctionCall, bounds_in, describe, words
from fmapkit.torchlib.memory import storage_of, version_of
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
# Give a tensor that has nothing of another one but its shape.
_FACTORIES = words(
    """arange ones zeros full eye linspace logspace tril_indices triu_indices tensor scalar_tensor
    as_tensor ones_like zeros_like full_like new_ones new_zeros new_full"""
)
# Give another result each time, whatever they are given.
_RANDOM = words(
    """rand randn randint randperm rand_like randn_like randint_like bernoulli multinomial normal
    uniform exponential geometric cauchy log_normal poisson random rrelu gumbel_softmax dropout
    dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout
    scaled_dot_product_attention fractional_max_pool2d fractional_max_pool3d empty empty_like
    empty_strided empty_permuted new_empty new_empty_strided resize resize_as set from_numpy
    frombuffer from_file from_dlpack __set__.data"""
)
_NUMBERS = frozenset({int, bool, float, complex, str, type(None), torch.dtype, torch.device})


class Constants:
    """Tensors of one pass that were made of numbers alone: positions, masks, tables of angles.

    A pass that takes the path of an earlier one makes them of the same numbers, so they are what
    they were then: who asks one for its truth, or for a number, does not decide by data.
    """

    def __init__(self, written: Mapping[int, int]) -> None:
        # By storage: the latest write to it that was seen, numbered from 0.
        self._written_to = written
        self._known: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def _latest(self, tensor: Tensor) -> int:
        """Tells of a write: torch's count of them, or where it counts none, the latest seen."""
        if tensor.is_inference():
            return self._written_to.get(storage_of(tensor), -1)
        return version_of(tensor)

    def hold(self, tensors: Sequence[Tensor]) -> bool:
        """Whether all of some tensors are constants that nobody has written to."""
        known = self._known
        for tensor in tensors:
            found = known.get(id(tensor))
            if found is None or found[0]() is not tensor or found[1] != self._latest(tensor):
                return False
        return bool(tensors)

    def made(self, call: FunctionCall, written: bool) -> None:
        """A function has run; `written`: it writes to its first argument, whatever it is given."""
        known, function, operands = self._known, call.name, call.operands
        if written and known and operands:
            self._written(function, operands)
            return
        if function in _FACTORIES:
            # What these make of a tensor's values is no constant; of its shape, it is one.
            if operands and function in ("tensor", "scalar_tensor", "as_tensor"):
                return
        elif not operands:  # torch makes a tensor of numbers, as in `torch.div(n, 2, ...)`
            if function in _RANDOM or not _are_numbers(*call.args, *call.kwargs.values()):
                return
        elif (
            (not known or id(operands[0]) not in known)  # as nearly always
            or function in _RANDOM
            or not self.hold(operands)
        ):
            return
        for tensor in tensors_in(call.out):
            known[id(tensor)] = weakref.ref(tensor), self._latest(tensor)

    def _written(self, function: str, operands: Sequence[Tensor]) -> None:
        """A function has written to a tensor: constants into a constant leave it one."""
        target = operands[0]
        found = self._known.get(id(target))
        if found is None or found[0]() is not target or function in _RANDOM:
            return
        once = self._latest(target) == found[1] + 1  # nobody else has
        if once and all(t is target or self.hold((t,)) for t in operands[1:]):
            self._known[id(target)] = found[0], found[1] + 1


def _are_numbers(*given: Any) -> bool:
    """Whether a function is given numbers alone, and what says how it takes them."""
    return any(type(v) in (int, bool, float, complex) for v in given) and _NUMBERS.issuperset(
        map(type, given)
    )


class DataReads:
    """Those of one pass."""

    def __init__(self, trace: PassTrace) -> None:
        self._trace = trace
        self._constants = Constants(trace.record.aliases.written)
        # The tensors that were made by cheap functions.
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
