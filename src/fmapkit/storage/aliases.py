"""The write barrier: what is held of a tensor is copied just before its memory is written to."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fmapkit.storage.gradients import watch
from fmapkit.storage.held import StoredTensor
from fmapkit.torchlib.memory import lifetime_of, storage_of, version_of


class Aliases:
    """Which held tensors share memory with one that is about to be written to."""

    def __init__(
        self,
        detach: bool = True,
        gradients: bool = False,
        lent: Callable[[Tensor], bool] = lambda _: False,
    ) -> None:
        self.detach = detach
        self.gradients = gradients
        self._lent = lent  # whether a tensor's memory will be gone when its module has run
        self.written: dict[int, int] = {}  # storages, each with how many writes were before it
        self.writes = 0
        # Storages that were made by what copies only if it must; whether some were written to.
        self.copies: dict[int, weakref.ref[Any]] = {}
        self.copies_written = False
        self._new: list[StoredTensor] = []
        self._by_storage: dict[int, list[StoredTensor]] = {}
        self._by_id: dict[int, tuple[weakref.ref[Tensor], StoredTensor]] = {}

    def end(self) -> None:
        """Let go of all that is held."""
        self.written.clear()
        self.copies.clear()
        self._new.clear()
        self._by_storage.clear()
        self._by_id.clear()

    def reference(self, tensor: Tensor) -> StoredTensor:
        """Hold a tensor, or share what is held of the same one already."""
        found = self._by_id.get(id(tensor))
        if found is not None and found[0]() is tensor:
            held = found[1]
            if held.tensor is not None and not held.copied and not held.lost:
                if version_of(tensor) == held.version:
                    if self.gradients and held.gradient is None:
                        # What a torch.autograd.Function returned is in the graph only now.
                        held.gradient = watch(tensor)
                    return held
        held = self.note(tensor)
        self._by_id[id(tensor)] = (weakref.ref(tensor), held)
        self._new.append(held)
        return held

    def note(self, tensor: Tensor) -> StoredTensor:
        """Hold a tensor as it is now."""
        kind = StoredTensor.copy if self._lent(tensor) else StoredTensor.reference
        return kind(tensor, self.detach, self.gradients)

    def forget(self, tensor: Tensor) -> None:
        """A tensor has other memory than it had: what was held of it is not this tensor's."""
        self._by_id.pop(id(tensor), None)

    def watch(self, held: StoredTensor) -> None:
        """Protect a tensor that was held elsewhere, perhaps as the model's own object."""
        held.own = False
        self._new.append(held)

    def of(self, tensor: Tensor) -> list[StoredTensor]:
        """Held references into the same memory."""
        return self.at(storage_of(tensor))

    def at(self, storage: int) -> list[StoredTensor]:
        """The same of a block of memory."""
        for held in self._new:
            if held.tensor is not None and not held.copied:
                self._by_storage.setdefault(storage_of(held.tensor), []).append(held)
        self._new.clear()
        found = self._by_storage.get(storage, [])
        return [h for h in found if h.tensor is not None and not h.copied]

    def written_since(self, writes: int) -> set[int]:
        """The storages that were written to after so many writes."""
        return {storage for storage, at in self.written.items() if at >= writes}

    def wrote(self, tensor: Tensor) -> None:
        """A tensor is written to."""
        memory = storage_of(tensor)
        self.written[memory] = self.writes
        self.writes += 1
        self.may_write(memory)

    def begin_region(self) -> None:
        """What is written from here on is what a region writes."""
        self.copies_written = False

    def may_write(self, storage: int) -> None:
        """Memory is written to, or may be: note whether it is that of a copy."""
        made = self.copies.get(storage)  # the same place may have another block by now
        self.copies_written = self.copies_written or (made is not None and made() is not None)

    def note_copy(self, out: Tensor, operands: Sequence[Tensor]) -> None:
        """A function of `MAY_COPY` has returned a tensor: note its memory, if that is a copy."""
        memory = storage_of(out)
        if all(storage_of(one) != memory for one in operands):
            made = lifetime_of(out)
            if made is not None:
                self.copies[memory] = made

    def before_write(self, tensor: Tensor, leads_on: bool = False) -> None:
        """Copy what a write to a tensor would lose.

        Where it leads on, σ writes, and what is held in the graph is to have its gradient.
        """
        leads_on = leads_on and not self.detach and type(tensor) is Tensor
        self.wrote(tensor)
        for held in sorted(self.of(tensor), key=lambda one: one.tensor is tensor):
            held.snapshot(leads_on and held.tensor is tensor)
