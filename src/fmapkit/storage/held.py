"""What is held of one tensor: a reference by default, a copy where an overwrite makes it needful.

A reference is a detached alias of the model's own tensor. Its version counter, which torch shares
among all aliases, tells whether anybody wrote to the memory since; a map that was written to raises
when it is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fmapkit.errors import MapOverwrittenError, MapReleasedError
from fmapkit.reasons import Reason
from fmapkit.storage.gradients import Gradient, watch
from fmapkit.torchlib.memory import version_of, versions_of
from fmapkit.torchlib.sharded import alias_of, ends_of, settled
from fmapkit.torchlib.side_ops import clone, goes_on_from
from fmapkit.torchlib.transforms import is_shapeless, unholdable


@dataclass(slots=True, eq=False, repr=False)
class StoredTensor:
    """One tensor in memory; several maps may share it."""

    tensor: Tensor | None
    version: int
    copied: bool = False
    gradient: Gradient | None = None
    arrival: Any = None  # of a copy from another device, to be waited for
    lost: bool = False  # overwritten before it could be copied
    on_the_way: bool = False  # a copy that the model's tensor goes on from
    doomed: bool = False  # spared this once; a later pass has to copy it
    own: bool = True  # an alias of our making; else it may be a tensor of the model's
    wanted: bool = False  # some map holds it; else it is held for the tracer's own sake

    @classmethod
    def reference(
        cls, tensor: Tensor, detach: bool = True, gradients: bool = False
    ) -> StoredTensor:
        """Keep the model's own memory; the model's own tensor, graph and all, if not detached."""
        alias = alias_of(tensor) if detach else tensor
        return cls(alias, version_of(alias), gradient=watch(tensor) if gradients else None)

    @classmethod
    def copy(cls, tensor: Tensor, detach: bool = True, gradients: bool = False) -> StoredTensor:
        """Keep the values as they are now."""
        gradient = watch(tensor) if gradients else None
        if gradient is not None:
            gradient.overwritten()
        copied = clone(tensor.detach() if detach else tensor)
        return cls(copied, version_of(copied), copied=True, gradient=gradient)

    def release(self) -> None:
        """Let go of the values, and of their gradient."""
        self.tensor = self.gradient = self.arrival = None

    def snapshot(self, leads_on: bool = False) -> None:
        """Turn the reference into a copy, just before the memory is written to.

        Where it leads on, the model's own tensor is held, and is to go on from the copy.
        """
        if self.gradient is not None:
            self.gradient.overwritten()
        if self.tensor is not None and not self.copied:
            if version_of(self.tensor) != self.version:
                self.lost = True
            original, self.tensor = self.tensor, clone(self.tensor)
            self.version = version_of(self.tensor)
            self.copied = True
            if leads_on and not self.lost:
                self.on_the_way = goes_on_from(original, self.tensor)

    def own_memory(self) -> None:
        """The memory is nobody else's any more: its former owner has other memory."""
        self.check()
        if self.tensor is not None:
            self.tensor = self.tensor.data
            self.version = version_of(self.tensor)

    def stored(self, tensor: Tensor, arrival: Any) -> None:
        """Hold what is stored of the tensor in its place: a copy, or the tensor itself."""
        if tensor is not self.tensor:
            self.tensor, self.version, self.copied = tensor, version_of(tensor), True
        self.arrival = arrival

    @property
    def needs_copy(self) -> bool:
        """Whether a later pass has to copy it."""
        return self.copied or self.lost or self.doomed

    def check(self) -> None:
        """Notice a write that nobody announced; `read` will raise."""
        if self.tensor is not None and version_of(self.tensor) != self.version:
            self.lost = True

    def _freed(self) -> bool:
        """Whether there is no memory behind the tensor any more."""
        if self.copied or self.tensor is None or not self.tensor.numel():
            return False
        tensor = ends_of(self.tensor)[-1]
        try:
            return tensor.numel() > 0 and not tensor.untyped_storage().nbytes()
        except (NotImplementedError, RuntimeError):  # sparse, and others without one storage
            return False

    def read(self, what: str) -> Tensor:
        """The tensor, if it still is what was captured.

        Raises:
            MapOverwrittenError: its memory was written to after it was captured.
            MapReleasedError: it was let go.
        """
        if self.tensor is None:
            raise MapReleasedError(
                f"{what} was let go (a newer pass, or clear()); "
                "capture(..., keep=n) keeps n passes readable"
            )
        self.check()
        if self._freed():
            raise MapReleasedError(
                f"{what} lay in memory that was given back when the pass was over (FSDP does so "
                "with parameters)"
            )
        if self.lost:
            raise MapOverwrittenError(
                f"{what} was written to in place after it was captured, so its values are not "
                "those of the pass any more; clone it inside the block, right after the pass, or "
                "run the model again: a write inside the model is copied around from then on"
            )
        if self.arrival is not None:
            self.arrival.synchronize()
            self.arrival = None
        return settled(self.tensor)


def check_all(held: list[StoredTensor]) -> None:
    """Notice writes that nobody announced, of many at once."""
    there = [one for one in held if one.tensor is not None]
    versions = versions_of([one.tensor for one in there if one.tensor is not None])
    for one, version in zip(there, versions, strict=True):
        if version != one.version:
            one.check()


def unheld(tensor: Tensor) -> str | None:
    """Why a tensor is not held; None if it may be."""
    if not unholdable(tensor):
        return None
    if is_shapeless(tensor):
        return Reason.NESTED_STRIDED.text()
    return Reason.TRANSFORMED.text()
