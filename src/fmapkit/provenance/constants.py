"""Tensors that were made of numbers alone: positions, masks without padding, tables of angles.

A pass that takes the path of an earlier one makes them of the same numbers, so they are what they
were then. Whoever asks such a tensor for its truth, or for a number, does not decide by data.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fmapkit.torchlib.memory import version_of
from fmapkit.torchlib.nested import tensors_in

# Give a tensor that has nothing of another one but its shape.
_FACTORIES = frozenset(
    {
        *("arange", "ones", "zeros", "full", "eye", "linspace", "logspace", "tril_indices"),
        *("triu_indices", "tensor", "scalar_tensor", "as_tensor"),
        *("ones_like", "zeros_like", "full_like", "new_ones", "new_zeros", "new_full"),
    }
)
# Give another result each time, whatever they are given.
_RANDOM = frozenset(
    {
        *("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like"),
        *("bernoulli", "multinomial", "normal", "uniform", "exponential", "geometric", "cauchy"),
        *("log_normal", "poisson", "random", "rrelu", "gumbel_softmax"),
        *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout"),
        *("feature_dropout", "feature_alpha_dropout", "scaled_dot_product_attention"),
        *("fractional_max_pool2d", "fractional_max_pool3d"),
        *("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty"),
        *("new_empty_strided", "resize", "resize_as", "set", "from_numpy", "frombuffer"),
        *("from_file", "from_dlpack", "__set__.data"),
    }
)


class Constants:
    """Those of one pass."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def hold(self, tensors: Sequence[Tensor]) -> bool:
        """Whether all of some tensors are constants that nobody has written to."""
        known = self._known
        for tensor in tensors:
            found = known.get(id(tensor))
            if found is None or found[0]() is not tensor or found[1] != version_of(tensor):
                return False
        return bool(tensors)

    def made(self, function: str, operands: Sequence[Tensor], out: Any) -> None:
        """A function has run."""
        known = self._known
        if function in _FACTORIES:
            # What these make of a tensor's values is no constant; of its shape, it is one.
            if operands and function in ("tensor", "scalar_tensor", "as_tensor"):
                return
        elif (
            (not known or not operands or id(operands[0]) not in known)  # as nearly always
            or function in _RANDOM
            or not self.hold(operands)
        ):
            return
        for tensor in tensors_in(out):
            known[id(tensor)] = weakref.ref(tensor), version_of(tensor)
