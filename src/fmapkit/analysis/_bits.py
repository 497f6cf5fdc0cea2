"""The least and the greatest of many floats, found among their bits as integers.

The bits of a float, read as an integer with a sign, grow with the number from 0 on; read as one
without a sign, those of a negative number are above all others, and grow as it falls. So the
greatest of them is the least number, if any is negative. NumPy finds the greatest of integers in
0.03 ns a value, of floats in 0.045; `torch.aminmax` takes 0.15 ns for both, 2.1 along an axis. For
half precision, integers take 0.024 ns, `torch.amin` of bfloat16 0.17. (One core, AVX-512.)
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Array", "Bits"]

# Integers, their bits, and the bits of infinity.
_KINDS = {
    torch.float64: (torch.int64, 64, 0x7FF << 52),
    torch.float32: (torch.int32, 32, 0xFF << 23),
    torch.float16: (torch.int16, 16, 0x1F << 10),
    torch.bfloat16: (torch.int16, 16, 0xFF << 7),
}

Array = np.ndarray[Any, Any]


class Bits:
    """How floats of one type are read as integers.

    *Keys* are such integers with a sign, in the order of the numbers.

    Args:
        dtype: of the floats.

    Attributes:
        signed: type of the integers with a sign.
        unsigned: without.
        most: the greatest with a sign; the key of no number but NaN.
        fewest: the least, the bits of -0; the key of no number but NaN.
        short: whether there are 16.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._float, (self._whole, bits, self._infinity) = dtype, _KINDS[dtype]
        self.signed, self.unsigned = np.dtype(f"i{bits // 8}"), np.dtype(f"u{bits // 8}")
        # As numbers of that type: with a plain int, NumPy 1 makes integers of 64 bits of them.
        self.most = self.signed.type(2 ** (bits - 1) - 1)
        self.fewest = self.signed.type(-(2 ** (bits - 1)))
        self._sign = 2 ** (bits - 1)
        self.short = bits == 16

    @staticmethod
    @cache
    def of(dtype: torch.dtype) -> Bits:
        """Of a type."""
        return Bits(dtype)

    def bits(self, values: Tensor) -> Array:
        """The bits, with a sign: a view."""
        found: Array = values.view(self._whole).numpy()
        return found

    def some_negative(self, top: Array) -> bool:
        """Whether a number has the sign, from greatest bits without a sign."""
        return bool(np.maximum.reduce(top) >= self._sign)

    def some_not_finite(self, top: Array, high: Array) -> bool:
        """Whether a NaN or an infinity is there, from greatest bits without and with a sign."""
        negative = np.maximum.reduce(top) >= self._sign + self._infinity
        return bool(negative or np.maximum.reduce(high) >= self._infinity)

    def ordered(self, top: Array) -> Array:
        """Bits without a sign as integers with one, in the same order."""
        found: Array = top.view(self.signed) ^ self.fewest
        return found

    def keys(
        self, ordered: Array, high: Array, least: Array | None, zeros: Array
    ) -> tuple[Array, Array]:
        """Keys of the least and the greatest.

        Args:
            ordered: the greatest bits without a sign.
            high: the greatest bits with a sign.
            least: the least bits, where no number has the sign; else 0; None: not looked for.
            zeros: how many numbers are 0.

        Returns:
            The least key is `most` where all that is known is that it is above 0, the greatest
            `fewest` where all that is known is that it is below.
        """
        top = ordered ^ self.fewest
        positive: Any = self.most
        if least is not None:  # where some parts were not searched, 0 is of another type
            positive = np.where(least > 0, least.astype(self.signed), self.most)
        low = np.where(zeros > 0, self.signed.type(0), positive)
        low = np.where(top < 0, top ^ self.most, low)
        return low, np.where(high < 0, self.fewest, high)

    def numbers(self, keys: Array) -> Array:
        """The float64 numbers of keys."""
        bits = np.where(keys < 0, keys ^ self.most, keys)
        if self._float == torch.bfloat16:  # NumPy has none: they are the upper half of a float32
            bits = bits.astype(np.int32) << 16
        return bits.view(f"f{bits.itemsize}").astype(np.float64)
