"""What is held of each map: a reference by default, a copy where an overwrite makes it needful.

A reference is a detached alias of the model's own tensor. Its version counter, which torch shares
among all aliases, tells whether anybody wrote to the memory since; a map that was written to raises
when it is read.
"""

from __future__ import annotations

import weakref
from collections import Counter, deque
from collections.abc import Callable, Container, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fmapkit._aside import clone
from fmapkit._axes import Axes
from fmapkit._gradients import Gradient, in_function, watch
from fmapkit._origin import Origin
from fmapkit._sharded import alias_of, ends_of, is_wrapped, settled
from fmapkit._transforms import inner, transforming
from fmapkit.errors import MapOverwrittenError, MapReleasedError
from fmapkit.heads import Heads

__all__ = ["Entry", "Held", "Pass", "Store", "version_of", "versions_of"]


_grads: Callable[[], bool] = torch.is_grad_enabled


def version_of(tensor: Tensor) -> int:
    """The version counter; -1 for inference tensors, which have none."""
    if tensor.is_inference():
        return -1
    if type(tensor) is not Tensor and is_wrapped(tensor):
        return sum(0 if t.is_inference() else t._version for t in ends_of(tensor))
    return tensor._version


def versions_of(tensors: list[Tensor]) -> list[int]:
    """The same of many."""
    try:
        return [t._version if type(t) is Tensor else version_of(t) for t in tensors]
    except RuntimeError:  # there is an inference tensor among them
        return list(map(version_of, tensors))


class Held:
    """One tensor in memory; several maps may share it."""

    __slots__ = (
        *("arrival", "copied", "doomed", "gradient", "lost", "own", "tensor", "version"),
        "wanted",
    )

    def __init__(
        self,
        tensor: Tensor | None,
        version: int,
        copied: bool = False,
        gradient: Gradient | None = None,
    ) -> None:
        self.tensor = tensor
        self.version = version
        self.copied = copied
        self.gradient = gradient
        self.arrival: Any = None  # of a copy from another device, to be waited for
        self.lost = False  # overwritten before it could be copied
        self.doomed = False  # spared this once; a later pass has to copy it
        self.own = True  # an alias of our making; else it may be a tensor of the model's
        self.wanted = False  # some map holds it; else it is held for the tracer's own sake

    @classmethod
    def reference(cls, tensor: Tensor, detach: bool = True, gradients: bool = False) -> Held:
        """Keep the model's own memory; the model's own tensor, graph and all, if not detached."""
        alias = alias_of(tensor) if detach else tensor
        return cls(alias, version_of(alias), gradient=watch(tensor) if gradients else None)

    @classmethod
    def copy(cls, tensor: Tensor, detach: bool = True, gradients: bool = False) -> Held:
        """Keep the values as they are now."""
        gradient = watch(tensor) if gradients else None
        if gradient is not None:
            gradient.overwritten()
        copied = clone(tensor.detach() if detach else tensor)
        return cls(copied, version_of(copied), copied=True, gradient=gradient)

    def release(self) -> None:
        """Let go of the values, and of their gradient."""
        self.tensor = self.gradient = self.arrival = None

    def snapshot(self) -> None:
        """Turn the reference into a copy, just before the memory is written to."""
        if self.gradient is not None:
            self.gradient.overwritten()
        if self.tensor is not None and not self.copied:
            if version_of(self.tensor) != self.version:
                self.lost = True
            self.tensor = clone(self.tensor)
            self.version = version_of(self.tensor)
            self.copied = True

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


class Entry:
    """One map: what it is, and where its values are held."""

    __slots__ = ("axes", "edited", "heads", "held", "kind", "origin", "path", "picked", "sigma")

    def __init__(
        self,
        kind: str,
        origin: Origin,
        held: Held | None,
        axes: Axes | None = None,
        sigma: str | None = None,
        path: str = "",
        picked: tuple[int, ...] | None = None,
        edited: Held | None = None,
    ) -> None:
        self.kind = kind
        self.origin = origin
        self.held = held
        self.axes = axes
        self.sigma = sigma
        self.path = path
        self.picked = picked  # the filters held, in the order held, where not all are
        self.edited = edited  # what went on in its place
        self.heads: Heads | None = None  # of attention

    def release(self) -> list[Tensor | None]:
        """Let go of the tensors; what they were."""
        both = [held for held in (self.held, self.edited) if held is not None]
        tensors = [held.tensor for held in both]
        for held in both:
            held.release()
        return tensors


class Pass:
    """The maps of one forward pass, in execution order.

    `segments` holds entries, and objects with an `entries()` method: replays of a plan, whose
    entries are made when somebody reads them and not while the model runs.

    Attributes:
        drop: to be called, with anything, for each map that comes: it lets go of one of the oldest
            pass's. All at once, their memory would go back to the system, to be asked for anew.
    """

    __slots__ = (
        *("_entries", "closed", "drop", "grads", "memory", "segments", "step", "training"),
        *("ids", "weights"),
    )

    def __init__(self, step: int, training: bool = False) -> None:
        self.step = step
        # As it began; the forward of an autograd Function, a reentrant checkpoint's, has them off.
        self.grads = _grads() or in_function()
        self.training = training  # the mode the model was in then
        self.segments: list[Any] = []
        self.closed = False
        self.drop: Callable[[Any], None] = _NOTHING.append
        self.memory: dict[int, int] | None = None  # as the store has counted it, in bytes
        self.ids: Tensor | None = None  # of its inputs, as the user numbers them
        # By its module's id and its key: each parameter, and its version, where that is asked for.
        self.weights: dict[tuple[int, str], tuple[Tensor, int]] | None = None
        self._entries: list[Entry] | None = None

    def entries(self) -> list[Entry]:
        """Every map held, in execution order."""
        if self._entries is not None:
            return self._entries
        found: list[Entry] = []
        for segment in self.segments:
            found.extend([segment] if isinstance(segment, Entry) else segment.entries())
        found = [e for e in found if e.held is not None]
        if self.closed:
            self._entries = found
        return found

    def held(self) -> list[Held]:
        """What is held in memory, each once."""
        both = [h for e in self.entries() for h in (e.held, e.edited)]
        return list({id(h): h for h in both if h is not None}.values())

    def without(self, refused: Container[int]) -> list[Entry]:
        """Leave out the entries of a closed pass that hold any of these, by id; which they were."""
        every = self.entries()
        gone = [e for e in every if id(e.held) in refused or id(e.edited) in refused]
        self._entries = [entry for entry in every if entry not in gone]
        return gone

    def discard(self) -> None:
        """Nothing of the pass so far is kept: what its maps are is not known any more."""
        for segment in self.segments:
            segment.release()
        self.segments.clear()
        self._entries = None

    def release(self) -> list[Any]:
        """Let go of every tensor; maps read before keep theirs.

        Returns:
            What holds them still, in execution order.
        """
        tensors = [t for entry in self._entries or () for t in entry.release()]
        held = [piece for segment in self.segments for piece in segment.release()]
        if tensors and held:  # some were read: what the segments have is the same
            size = -(-len(tensors) // len(held))
            held = [tensors[at : at + size] for at in range(0, len(tensors), size)]
        self.segments.clear()
        self._entries = []
        self.closed = True
        return held


# Of no length: whatever is put there is gone.
_NOTHING: deque[Any] = deque(maxlen=0)


class Store:
    """The last passes, newest last.

    Args:
        keep: how many; None for all of them. Of 0, there is one while it runs.
    """

    def __init__(self, keep: int | None) -> None:
        self.passes: deque[Pass] = deque()
        self.fleeting = keep == 0
        self.keep = 1 if self.fleeting else keep
        self._users: Counter[int] = Counter()  # by storage: how many counted passes hold it
        self._total = 0
        self._going: deque[Any] = _NOTHING

    def begin(self, step: int, training: bool, gradually: bool = False) -> Pass:
        """Room for a new pass: the oldest is let go before the model allocates again.

        Args:
            step: how many passes there were before.
            training: the model's mode.
            gradually: its maps go one by one, as the new ones come.
        """
        new = Pass(step, training)
        while self.keep is not None and len(self.passes) >= self.keep:
            _, held = self._let_go()
            if gradually:
                self._going = deque(held, maxlen=len(held))
                new.drop = self._going.append
            del held
        self.passes.append(new)
        return new

    def end(self) -> None:
        """A pass has ended: what is left of the oldest one goes."""
        self._going.clear()
        self._going = _NOTHING
        if self.passes:
            self.passes[-1].drop = _NOTHING.append

    @property
    def nbytes(self) -> int:
        """Bytes of memory that all passes hold; shared memory counts once."""
        return sum(_memory(h for p in self.passes for h in p.held()).values())

    def count(self) -> int:
        """The same of passes that have ended: each is looked at once, when it is the newest."""
        for ended in reversed(self.passes):
            if ended.memory is not None:
                break
            ended.memory = _memory(ended.held())
            for storage, size in ended.memory.items():
                if not self._users[storage]:
                    self._total += size
                self._users[storage] += 1
        return self._total

    def let_go(self, newest: bool = False) -> Pass:
        """Let the oldest pass go, or the newest one."""
        return self._let_go(newest)[0]

    def _let_go(self, newest: bool = False) -> tuple[Pass, list[Any]]:
        """And what holds its tensors still."""
        gone = self.passes.pop() if newest else self.passes.popleft()
        for storage, size in (gone.memory or {}).items():
            self._users[storage] -= 1
            if not self._users[storage]:
                del self._users[storage]
                self._total -= size
        return gone, gone.release()

    def clear(self) -> None:
        """Let everything go."""
        while self.passes:
            self.let_go()

    def latest(self) -> Pass | None:
        """The newest pass, which may still be running."""
        return self.passes[-1] if self.passes else None

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)


def _memory(held: Iterable[Held]) -> dict[int, int]:
    """The storages in which these lie, and their bytes."""
    tensors = [t for h in held if h.tensor is not None for t in parts_of(h.tensor)]
    return dict(map(_block, tensors))


def _block(tensor: Tensor) -> tuple[int, int]:
    """A tensor's block of memory, and its bytes; if torch shows none, that of its values alone."""
    try:
        storage = tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return id(tensor), tensor.numel() * tensor.element_size()
    return storage._cdata, storage.nbytes()


def parts_of(tensor: Tensor) -> list[Tensor]:
    """The tensors that have the memory: itself, as a rule; of a sparse one, those it is made of."""
    tensor = ends_of(tensor)[-1]
    if is_traceable_wrapper_subclass(tensor):
        inner = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        return [part for t in inner for part in parts_of(t)]
    with torch._C.DisableTorchFunction():
        tensor = tensor.detach()
        if tensor.layout is torch.sparse_coo:
            return [tensor._indices(), tensor._values()]
        if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
            return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
        if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
            return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor]


class Aliases:
    """Which held tensors share memory with one that is about to be written to."""

    __slots__ = ("_by_id", "_by_storage", "_lent", "_new", "detach", "gradients", "written")

    def __init__(
        self,
        detach: bool = True,
        gradients: bool = False,
        lent: Callable[[Tensor], bool] = lambda _: False,
    ) -> None:
        self.detach = detach
        self.gradients = gradients
        self._lent = lent  # whether a tensor's memory will be gone when its module has run
        self.written: set[int] = set()  # storages that were written to
        self._new: list[Held] = []
        self._by_storage: dict[int, list[Held]] = {}
        self._by_id: dict[int, tuple[weakref.ref[Tensor], Held]] = {}

    def end(self) -> None:
        """Let go of all that is held."""
        self.written.clear()
        self._new.clear()
        self._by_storage.clear()
        self._by_id.clear()

    def reference(self, tensor: Tensor) -> Held:
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
        kind = Held.copy if self._lent(tensor) else Held.reference
        held = kind(tensor, self.detach, self.gradients)
        self._by_id[id(tensor)] = (weakref.ref(tensor), held)
        self._new.append(held)
        return held

    def forget(self, tensor: Tensor) -> None:
        """A tensor has other memory than it had: what was held of it is not this tensor's."""
        self._by_id.pop(id(tensor), None)

    def holds(self, tensor: Tensor, held: Held) -> bool:
        """Whether that is what is held of the tensor."""
        found = self._by_id.get(id(tensor))
        return found is not None and found[1] is held and found[0]() is tensor

    def watch(self, held: Held) -> None:
        """Protect a tensor that was held elsewhere, perhaps as the model's own object."""
        held.own = False
        self._new.append(held)

    def of(self, tensor: Tensor) -> list[Held]:
        """Held references into the same memory."""
        for held in self._new:
            if held.tensor is not None and not held.copied:
                self._by_storage.setdefault(storage_of(held.tensor), []).append(held)
        self._new.clear()
        found = self._by_storage.get(storage_of(tensor), [])
        return [h for h in found if h.tensor is not None and not h.copied]

    def before_write(self, tensor: Tensor) -> None:
        """Copy what the write would lose."""
        self.written.add(storage_of(tensor))
        for held in self.of(tensor):
            held.snapshot()


def storage_of(tensor: Tensor) -> int:
    """What tells one block of memory from another."""
    if transforming() is not None:
        tensor = inner(tensor)
    if is_wrapped(tensor):
        tensor = ends_of(tensor)[-1]
    if type(tensor) is not Tensor and is_traceable_wrapper_subclass(tensor):
        return storage_of(parts_of(tensor)[0])
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse, and other tensors without one storage
        return id(tensor)


def storage_users(tensor: Tensor) -> int:
    """How many tensors, of Python or of autograd, share the storage; 0 if torch cannot tell."""
    count: Any = getattr(torch._C, "_storage_Use_Count", None)
    if count is None:
        return 0
    try:
        storage = tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return 0
    return int(count(storage._cdata)) - 1  # less the handle made here
