"""The edges of a histogram, and which column of it a value falls in."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fmapkit.errors import ArgumentError

# Powers of two on both sides of 0, over the normal range of float16.
_LEAST, _MOST = -14, 15
_POWERS = [2.0**k for k in range(_LEAST, _MOST + 1)]
_LOG2 = [*(-power for power in reversed(_POWERS)), 0.0, *_POWERS]

# How a float is laid out: as an integer, bits of the fraction, exponent field of 1.
_LAYOUT = {torch.float64: (torch.int64, 52, 1023), torch.float32: (torch.int32, 23, 127)}


def placed(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device, without waiting for it."""
    if tensor.device == device:
        return tensor
    if device.type == "mps" and tensor.dtype == torch.float64:
        tensor = tensor.float()
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class Edges:
    """Increasing edges; columns of the histogram are what lies below, between and above them."""

    def __init__(self, edges: list[float]) -> None:
        self.edges = edges
        self.tensor = torch.tensor(edges, dtype=torch.float64, device="cpu")
        self._by_exponent = edges == _LOG2
        self._on: dict[torch.device, Tensor] = {}

    @staticmethod
    def of(bins: Sequence[float] | str | None) -> Edges | None:
        """What `Statistics(bins=...)` means; an `ArgumentError` if it means nothing."""
        if bins is None:
            return None
        if isinstance(bins, str):
            if bins != "log2":
                raise ArgumentError(
                    f"bins must be a sequence of edges, 'log2' or None, not {bins!r}"
                )
            bins = _LOG2
        try:
            edges = [float(edge) for edge in bins]
        except (TypeError, ValueError):
            edges = []
        rising = all(a < b for a, b in itertools.pairwise(edges))
        if not edges or not rising or not all(map(math.isfinite, edges)):
            raise ArgumentError(
                "bins takes the edges of a histogram, at least one, finite and increasing; the "
                f"range of maps that have not come yet cannot be divided into {bins!r}"
            )
        return Edges(edges)

    @property
    def columns(self) -> int:
        return len(self.edges) + 1

    def column_of(self, values: Tensor) -> Tensor:
        """int64: of each float x the i with edges[i - 1] <= x < edges[i]; of NaN, any i."""
        if self._by_exponent and values.dtype in _LAYOUT:
            return _by_exponent(values)
        device = values.device
        if device not in self._on:
            self._on[device] = placed(self.tensor, device)
        return torch.bucketize(values, self._on[device].to(values.dtype), right=True)


def _by_exponent(values: Tensor) -> Tensor:
    """The column among powers of two, read off the bits: a search takes several times as long."""
    whole, fraction, one = _LAYOUT[values.dtype]
    # 0 for -0, whose bits are those of a negative number.
    bits = (values + 0).view(whole)
    negative = bits >> (torch.iinfo(whole).bits - 1)  # -1, else 0
    # An edge belongs to what is right of it: below zero, that is where the numbers are smaller.
    size = (bits & torch.iinfo(whole).max).add_(negative)
    power = (size >> fraction).sub_(one + _LEAST - 1).clamp_(0, len(_POWERS))
    # -1 - power below zero.
    return power.bitwise_xor_(negative).add_(len(_POWERS) + 1).to(torch.int64)
