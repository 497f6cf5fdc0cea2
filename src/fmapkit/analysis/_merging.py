"""The moments of two sets of values, from those of each.

The pairwise rule of Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing
sample variances", Stanford CS-79-773, 1979. Means are kept as differences to a fixed value near
them: far from 0 the mean's last digit is coarse beside the spread of the values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["chan"]


def chan(library: Any, n: int, a: Sequence[Any], m: int, b: Sequence[Any]) -> tuple[Any, ...]:
    """Shift, offset, m2, minimum, maximum and counts of both sides, as `Moments` has them.

    Args:
        library: whose arrays they are, `torch` or `numpy`.
        n: values of each filter of one side.
        a: its state.
        m: values of the other.
        b: its state.
    """
    shift, offset, m2, low, high, counts = a
    its_shift, its_offset, its_m2, its_low, its_high, its_counts = b
    delta = (its_shift - shift) + (its_offset - offset)
    between = offset + delta * (m / (n + m))
    # Infinite already: so it stays, as in NumPy, though inf - inf above is not a number.
    return (
        shift,
        library.where(library.isinf(offset), offset + its_offset, between),
        m2 + its_m2 + delta * delta * (n / (n + m) * m),
        library.minimum(low, its_low),
        library.maximum(high, its_high),
        counts + its_counts,
    )
