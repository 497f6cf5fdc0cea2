"""The edges of a histogram."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fmapkit.errors import ArgumentError

__all__ = ["edges_of"]

# Powers of two on both sides of 0, over the normal range of float16.
_LOG2 = [
    *(-(2.0**k) for k in range(15, -15, -1)),
    *(0.0,),
    *(2.0**k for k in range(-14, 16)),
]


def edges_of(bins: Sequence[float] | str | None) -> Tensor | None:
    """The edges that `Statistics(bins=...)` means, on the CPU.

    Raises:
        ArgumentError: they are none.
    """
    if bins is None:
        return None
    if isinstance(bins, str):
        if bins != "log2":
            raise ArgumentError(f"bins must be a sequence of edges, 'log2' or None, not {bins!r}")
        bins = _LOG2
    try:
        edges = [float(edge) for edge in bins]
    except (TypeError, ValueError):
        edges = []
    rising = all(a < b for a, b in itertools.pairwise(edges))
    if not edges or not rising or not all(map(math.isfinite, edges)):
        raise ArgumentError(
            "bins takes the edges of a histogram, at least one, finite and increasing; the range "
            f"of maps that have not come yet cannot be divided into {bins!r}"
        )
    return torch.tensor(edges, dtype=torch.float64, device="cpu")
