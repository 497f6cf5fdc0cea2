"""What is stored of a map: itself, or a copy of some filters, in another dtype, on another device.

A reference costs nothing and is the default. A copy goes to a buffer that is used again, pass by
pass (see `storage/buffers.py`); one that leaves a GPU travels beside the model's work
(`storage/offload.py`).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fmapkit.missed import NotSupportedError, Reason
from fmapkit.storage.buffers import Buffers
from fmapkit.storage.offload import Arrival, Cuda, Offload
from fmapkit.torchlib.sharded import is_wrapped
from fmapkit.torchlib.side_ops import looking, operators_are_counted, runs, select, unseen

_MANY = 10_000

# An axis, and where on it the picked filters lie.
Place = tuple[int, tuple[int, ...]]


class StorageConversion:
    """How one capture stores its maps."""

    def __init__(self, dtype: torch.dtype | None, device: torch.device | None) -> None:
        self.dtype = dtype  # of what is stored of floating-point maps; None for the map's own
        self.device = device  # where it is stored; None for the map's own
        self.buffers = Buffers()
        self._offloads: dict[torch.device, Offload] = {}
        self._arrivals: dict[int, Arrival] = {}  # by the buffer's storage
        # Stored in this pass: the map, and what is stored of it.
        self._known: dict[Any, tuple[weakref.ref[Tensor], Tensor]] = {}

    def __bool__(self) -> bool:
        """Whether anything but filters may turn a reference into a copy."""
        return self.dtype is not None or self.device is not None

    def forget(self) -> None:
        """Hold nothing for the sake of maps that may come."""
        self._known.clear()

    def fence(self) -> None:
        """From here on others may write to what was stored so far: copies come first."""
        for offload in self._offloads.values():
            offload.settle()

    def end(self) -> None:
        """The pass has ended."""
        self.forget()
        self.buffers.end()
        if len(self._arrivals) > _MANY:  # of buffers that are gone by now, most of them
            self._arrivals = {k: a for k, a in self._arrivals.items() if not a.query()}
        self.fence()

    def close(self) -> None:
        """The block has ended; maps stay readable."""
        self.forget()
        self.buffers.clear()

    def arrival(self, stored: Tensor) -> Arrival | None:
        """What to wait for before a stored tensor is read."""
        if not self._arrivals or stored.device.type != "cpu":
            return None
        return self._arrivals.get(stored.untyped_storage()._cdata)

    def keep(
        self,
        tensor: Tensor,
        place: Place | None = None,
        *,
        detach: bool = True,
        doomed: bool = False,
    ) -> Tensor:
        """What is stored of a tensor; the tensor itself, where nothing about it is to change.

        Without a place to pick from, it is all of it; a doomed one is about to be overwritten.
        """
        if place is None and not self.changes(tensor):
            return tensor
        dtype, moves = self._dtype_of(tensor), self._moves(tensor)
        device = self.device if moves and self.device is not None else tensor.device
        try:
            with looking():
                return self._stored(tensor, place, dtype, device, detach, doomed)
        except (NotImplementedError, RuntimeError, TypeError) as error:
            sentence = str(error).partition("\n")[0].partition(". ")[0]
            raise NotSupportedError(
                Reason.CANNOT_BE_STORED.text(kind=_kind(tensor), error=sentence)
            ) from error

    def changes(self, tensor: Tensor) -> bool:
        """Whether a tensor is stored in another form than its own."""
        return self._dtype_of(tensor) != tensor.dtype or self._moves(tensor)

    def _dtype_of(self, tensor: Tensor) -> torch.dtype:
        return self.dtype if self.dtype and tensor.is_floating_point() else tensor.dtype

    def _stored(
        self,
        tensor: Tensor,
        place: Place | None,
        dtype: torch.dtype,
        device: torch.device,
        detach: bool,
        doomed: bool,
    ) -> Tensor:
        in_graph = tensor.requires_grad and not detach
        if in_graph or is_wrapped(tensor) or tensor.layout is not torch.strided:
            source = tensor if in_graph else tensor.detach()
            if place is not None:
                source = select(source, *place)
            with unseen():
                return source.to(device, dtype)
        counted = not tensor.is_inference()  # else a write in between would go unnoticed
        key = (id(tensor), tensor._version if counted else 0, place)
        found = self._known.get(key)
        if found is not None and found[0]() is tensor:
            return found[1]
        quiet = not torch.is_grad_enabled() and not operators_are_counted()
        with nullcontext() if quiet else _not_the_models():
            if self._leaves(tensor, device):
                stored = self._sent(tensor, place, dtype, doomed)
            else:
                stored = self._copied(tensor, place, dtype, device)
        if counted:
            self._known[key] = (weakref.ref(tensor), stored)
        return stored

    def _moves(self, tensor: Tensor) -> bool:
        """Whether it is to be stored on another device."""
        wanted, there = self.device, tensor.device
        if wanted is None:
            return False
        return wanted.type != there.type or wanted.index not in (None, there.index)

    @staticmethod
    def _leaves(tensor: Tensor, device: torch.device) -> bool:
        return tensor.is_cuda and device.type == "cpu"

    @staticmethod
    def _carrier(home: torch.device) -> Cuda:
        return Cuda(home)

    def _copied(
        self, tensor: Tensor, place: Place | None, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        if place is None:
            return self.buffers.like(tensor, dtype, device).copy_(tensor)
        dim, places = place
        pieces = runs(places)
        if len(pieces) == 1:
            piece = tensor.narrow(dim, *pieces[0])
            return self.buffers.like(piece, dtype, device).copy_(piece)
        stored = self.buffers.like(tensor.narrow(dim, 0, len(places)), dtype, device)
        at = 0
        for first, count in pieces:
            stored.narrow(dim, at, count).copy_(tensor.narrow(dim, first, count))
            at += count
        return stored

    def _sent(
        self, tensor: Tensor, place: Place | None, dtype: torch.dtype, doomed: bool
    ) -> Tensor:
        """The same from a GPU to the host.

        What is made for the way is new each time: the copy reads it while the model goes on.
        """
        made = tensor if place is None else select(tensor, *place)
        if made.dtype != dtype:
            made = made.to(dtype)
        if doomed and made is tensor:
            made = made.clone()
        home = made.device
        if home not in self._offloads:
            self._offloads[home] = Offload(self._carrier(home))
        stored = self.buffers.like(made, made.dtype, torch.device("cpu"), pin=True)
        self._arrivals[stored.untyped_storage()._cdata] = self._offloads[home].send(made, stored)
        return stored


def _kind(tensor: Tensor) -> str:
    """What a tensor is called where it is no plain one."""
    if type(tensor) is not Tensor:
        return type(tensor).__name__
    if tensor.is_meta:
        return "meta tensor"
    return f"tensor of {'quantized ' if tensor.is_quantized else ''}{tensor.layout}"


@contextmanager
def _not_the_models() -> Iterator[None]:
    with torch.no_grad(), unseen():
        yield
