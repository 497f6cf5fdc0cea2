"""Tensors that were made of numbers alone: positions, masks without padding, tables of angles.

A pass that takes the path of an earlier one makes them of the same numbers, so they are what they
were then. Whoever asks such a tensor for its truth, or for a number, does not decide by data.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fmapkit.provenance.rule_basics import FunctionCall
from fmapkit.provenance.vocabulary import words
from fmapkit.torchlib.memory import storage_of, version_of
from fmapkit.torchlib.nested import tensors_in

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


class Constants:
    """Those of one pass.

    Args:
        written: by storage: the latest write to it that was seen, numbered from 0.
    """

    def __init__(self, written: Mapping[int, int]) -> None:
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


_NUMBERS = frozenset({int, bool, float, complex, str, type(None), torch.dtype, torch.device})


def _are_numbers(*given: Any) -> bool:
    """Whether a function is given numbers alone, and what says how it takes them."""
    return any(type(v) in (int, bool, float, complex) for v in given) and _NUMBERS.issuperset(
        map(type, given)
    )
