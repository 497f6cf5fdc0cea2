"""Copies of values out of the model's memory, for maps that outlive it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class ValueCopies:
    """Copies values out of the model's memory; what several maps share, they share again."""

    def __init__(self) -> None:
        self._known: dict[Any, Tensor] = {}
        self._alive: list[Tensor] = []  # so that no memory is used twice meanwhile

    def of(self, tensor: Tensor) -> Tensor:
        """The values of a tensor, outside the graph and in memory of their own."""
        place = _place(tensor)
        if place is None:
            return _alone(tensor)
        if place not in self._known:
            self._known[place] = _alone(tensor)
            self._alive.append(tensor)
        return self._known[place]


def _alone(tensor: Tensor) -> Tensor:
    """A copy of the values, outside the graph."""
    with torch.inference_mode(False), torch.no_grad():
        return tensor.detach().clone()


def _place(tensor: Tensor) -> Any:
    """Where in memory the values lie, and how; None where torch does not tell."""
    if type(tensor) is not Tensor or tensor.layout is not torch.strided or tensor.is_quantized:
        return None
    if tensor.is_nested or not tensor.numel() or tensor.device.type == "meta":
        return None
    return (
        *(tensor.device, tensor.dtype, tensor.data_ptr(), tuple(tensor.shape), tensor.stride()),
        *(tensor.is_conj(), tensor.is_neg()),
    )
