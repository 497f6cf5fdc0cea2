"""Memory that is made once and used again: for maps that are copies, pass after pass.

A buffer goes out again only when nobody else has it any more. Nobody has to give it back: torch
counts the tensors, arrays and views on each block of memory, so that a map somebody still reads is
never written to.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from fmapkit._store import storage_users

__all__ = ["Buffers"]


class Buffers:
    """A ring of buffers for each form of tensor: whichever was handed out first is next.

    Attributes:
        made: bytes allocated so far.
    """

    def __init__(self) -> None:
        self._rings: dict[object, deque[Tensor]] = {}
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
        key = (tensor.shape, tensor.stride(), dtype, device, pin)
        ring = self._rings.setdefault(key, deque())
        if ring and storage_users(ring[0]) == 1:
            ring.rotate(-1)
            return ring[-1].detach()
        # Written to in any mode later on, which torch allows with what was made in none.
        with torch.inference_mode(False):
            made = torch.empty_like(tensor, dtype=dtype, device=device, pin_memory=pin)
        self.made += made.numel() * made.element_size()
        if storage_users(made):  # 0: this torch cannot tell
            ring.append(made)
        return made.detach()

    def clear(self) -> None:
        """Let go of all of them; whoever reads one keeps it."""
        self._rings.clear()
