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

from fmapkit.torchlib.memory import storage_users

# For so many passes after its last one, a form that comes back is waited for.
_FEW = 4


class _Lent(weakref.ref[Tensor]):
    """An alias of a buffer that is with somebody."""

    __slots__ = ("buffer", "form")

    buffer: Tensor
    form: Any


class _Form:
    """Buffers of one form that are with nobody, and who asked for such."""

    def __init__(self, now: int) -> None:
        self.back: list[Tensor] = []
        self.latest = now  # the last pass that asked for any
        self.asked = 0  # how many it asked for
        self.comes_back = False  # some pass asked for it again after one that had not

    def ask(self, now: int) -> None:
        """A pass needs one."""
        if now != self.latest:
            self.comes_back = self.comes_back or now > self.latest + 1
            self.latest, self.asked = now, 0
        self.asked += 1


class Buffers:
    """Buffers for each form of tensor.

    What an older pass had serves the next one. What that one has not needed is let go when it ends:
    shapes may change from pass to pass, and maps are held and not a byte more. Only a form that has
    come back already is waited for once more, for a few passes: shapes may alternate, too.
    """

    def __init__(self) -> None:
        self._forms: dict[Any, _Form] = {}  # of the last few passes
        self._lent: dict[int, _Lent] = {}
        self._now = 0
        self.made = 0  # bytes allocated so far

    def like(
        self, tensor: Tensor, dtype: torch.dtype, device: torch.device, pin: bool = False
    ) -> Tensor:
        """Memory for a copy of a strided tensor, in the same layout.

        Where it is pinned, a device can write to it by itself.
        """
        # By source, too: copies from one device end in order, those from two may not.
        form = (tensor.shape, tensor.stride(), tensor.device, dtype, device, pin)
        known = self._forms.get(form)
        if known is None:
            known = self._forms[form] = _Form(self._now)
        known.ask(self._now)
        while known.back:
            buffer = known.back.pop()
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
        known = self._forms.get(lent.form)
        if self._lent.pop(id(lent), None) is not None and known is not None:
            known.back.append(lent.buffer)

    def end(self) -> None:
        """A pass has ended: let go of what is not waited for."""
        for form, known in tuple(self._forms.items()):
            age = self._now - known.latest
            if age >= _FEW:
                del self._forms[form]
            elif age and known.comes_back:
                del known.back[known.asked :]
            else:
                known.back.clear()
        self._now += 1

    def drop(self) -> None:
        """Let go of those that nobody has."""
        for known in self._forms.values():
            known.back.clear()

    def clear(self) -> None:
        """Let go of all of them; whoever reads one keeps it."""
        self._lent.clear()
        self._forms.clear()
