"""Memory that is made once and used again: for maps that are copies, pass after pass.

What is handed out is an alias of a buffer. When it dies, the buffer is back, and nobody has to give
it: torch counts the tensors, arrays and views on each block of memory, so that one of which
somebody still has a part is never written to.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from fmapkit._store import storage_users

__all__ = ["Buffers"]


class _Lent(weakref.ref[Tensor]):
    """An alias of a buffer that is with somebody."""

    __slots__ = ("buffer", "form")

    buffer: Tensor
    form: Any


class Buffers:
    """Buffers for each form of tensor.

    What an older pass had serves the next one. What that one has not needed is let go when it ends:
    shapes may change from pass to pass, and maps are held and not a byte more.

    Attributes:
        made: bytes allocated so far.
    """

    def __init__(self) -> None:
        self._back: dict[Any, list[Tensor]] = {}
        self._lent: dict[int, _Lent] = {}
        self.made = 0

    def like(
        self, tensor: Tensor, dtype: torch.dtype, device: torch.device, pin: bool = False
    ) -> Tensor:
        """Memory for a copy of a tensor, in the same layout.

        Args:
            tensor: to be copied, strided.
            dtype: of the copy.
            device: of the copy.
            pin: page-locked, so that a device can write to it by itself.
        """
        # By source, too: copies from one device end in order, those from two may not.
        form = (tensor.shape, tensor.stride(), tensor.device, dtype, device, pin)
        back = self._back.get(form, [])
        while back:
            buffer = back.pop()
            if storage_users(buffer) == 1:  # else its memory is with whoever has a view of it
                return self._lend(buffer, form)
        # Written to in any mode later on, which torch allows with what was made in none.
        with torch.inference_mode(False):
            made = torch.empty_like(tensor, dtype=dtype, device=device, pin_memory=pin)
        self.made += made.numel() * made.element_size()
        return self._lend(made, form)

    def _lend(self, buffer: Tensor, form: Any) -> Tensor:
        alias = buffer.detach()
        lent = _Lent(alias, self._returned)
        lent.buffer, lent.form = buffer, form
        self._lent[id(lent)] = lent
        return alias

    def _returned(self, lent: Any) -> None:
        if self._lent.pop(id(lent), None) is not None:
            self._back.setdefault(lent.form, []).append(lent.buffer)

    def drop(self) -> None:
        """Let go of those that nobody has."""
        self._back.clear()

    def clear(self) -> None:
        """Let go of all of them; whoever reads one keeps it."""
        self._lent.clear()
        self.drop()
