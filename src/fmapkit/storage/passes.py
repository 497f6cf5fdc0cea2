"""The maps of each pass, in order, and the last passes: which are kept, and how much they hold."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Container, Iterable, Iterator
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fmapkit.errors import ArgumentError, BudgetError, is_int
from fmapkit.provenance import Buffers, ChannelLayout, Heads, Origin
from fmapkit.storage.gradients import in_function
from fmapkit.storage.held import StoredTensor
from fmapkit.torchlib.memory import block_of, parts_of

_grads: Callable[[], bool] = torch.is_grad_enabled


@dataclass(slots=True, eq=False, repr=False)
class MapRecord:
    """One map: what it is, and where its values are held."""

    kind: str
    origin: Origin
    held: StoredTensor | None
    axes: ChannelLayout | None = None
    sigma: str | None = None
    path: str = ""
    picked: tuple[int, ...] | None = None  # the filters held, in the order held, where not all are
    edited: StoredTensor | None = None  # what went on in its place
    heads: Heads | None = None  # of attention

    def release(self) -> list[Tensor | None]:
        """Let go of the tensors; what they were."""
        both = [held for held in (self.held, self.edited) if held is not None]
        tensors = [held.tensor for held in both]
        for held in both:
            held.release()
        return tensors


class Block:
    """One block of a capture, which tells its passes from those of others.

    Attributes:
        ended: no pass comes any more.
    """

    def __init__(self) -> None:
        self.ended = False

    def end(self) -> None:
        """It has ended."""
        self.ended = True

    def __getstate__(self) -> dict[str, bool]:
        return {"ended": True}  # to a copy, no pass comes


class Pass:
    """The maps of one forward pass, in execution order.

    `segments` holds entries, and objects with an `entries()` method: replays of a plan, whose
    entries are made when somebody reads them and not while the model runs.
    """

    def __init__(self, step: int, training: bool = False, block: Block | None = None) -> None:
        self.step = step
        self.block = block
        # As it began; the forward of an autograd Function, a reentrant checkpoint's, has them off.
        self.grads = _grads() or in_function()
        self.training = training  # the mode the model was in then
        self.segments: list[Any] = []
        self.closed = False
        # To be called for each map that comes: it lets go of one of the oldest pass's. All at once,
        # their memory would go back to the system, to be asked for anew.
        self.drop: Callable[[Any], None] = _NOTHING.append
        self.memory: dict[int, int] | None = None  # as the store has counted it, in bytes
        self.ids: Tensor | None = None  # of its inputs, as the user numbers them
        self.mask: Tensor | None = None  # which of their positions are no padding, as the user says
        # By its module's id and its key: each parameter, and its version, where that is asked for.
        self.weights: dict[tuple[int, str], tuple[Tensor, int]] | None = None
        # The same of buffers that are weights, where a plan has told whose they are.
        self.buffers: Buffers = {}
        self._entries: list[MapRecord] | None = None

    def entries(self) -> list[MapRecord]:
        """Every map held, in execution order."""
        if self._entries is not None:
            return self._entries
        found: list[MapRecord] = []
        for segment in self.segments:
            found.extend([segment] if isinstance(segment, MapRecord) else segment.entries())
        found = [e for e in found if e.held is not None]
        if self.closed:
            self._entries = found
        return found

    def held(self) -> list[StoredTensor]:
        """What is held in memory, each once."""
        both = [h for e in self.entries() for h in (e.held, e.edited)]
        return list({id(h): h for h in both if h is not None}.values())

    def without(self, refused: Container[int]) -> list[MapRecord]:
        """Leave out the entries of a closed pass that hold any of these, by id; which they were."""
        every = self.entries()
        gone = [e for e in every if id(e.held) in refused or id(e.edited) in refused]
        self._entries = [entry for entry in every if entry not in gone]
        return gone

    def keep_only(self, asked: Callable[[MapRecord], bool]) -> None:
        """Of a closed pass, let go of every map but these."""
        self._entries = list(filter(asked, self.entries()))
        self.segments = list(self._entries)

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


class PassStore:
    """The last passes, newest last."""

    def __init__(self, keep: int | None) -> None:
        self.passes: deque[Pass] = deque()
        self.block = Block()  # that is open, or the next one
        self.fleeting = keep == 0  # there is one while it runs
        self.keep = 1 if self.fleeting else keep  # how many; None for all of them
        self._users: Counter[int] = Counter()  # by storage: how many counted passes hold it
        self._total = 0
        self._going: deque[Any] = _NOTHING

    def take(self) -> PassStore:
        """The block has ended: another store, with all passes that this one has had."""
        taken = copy(self)
        self.block.end()
        self.block = Block()
        self.passes, self._users, self._total = deque(), Counter(), 0
        return taken

    def begin(self, step: int, training: bool, gradually: bool = False) -> Pass:
        """Room for a new pass: the oldest is let go before the model allocates again.

        Gradually, its maps go one by one, as the new ones come.
        """
        new = Pass(step, training, self.block)
        while self.keep is not None and len(self.passes) >= self.keep:
            _, held = self.let_go()
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

    def let_go(self, newest: bool = False) -> tuple[Pass, list[Any]]:
        """Let the oldest pass go, or the newest one; and what holds its tensors still."""
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


def _memory(held: Iterable[StoredTensor]) -> dict[int, int]:
    """The storages in which these lie, and their bytes."""
    tensors = [t for h in held if h.tensor is not None for t in parts_of(h.tensor)]
    return dict(map(block_of, tensors))


@dataclass(frozen=True)
class Budget:
    """A limit, looked at as each pass ends."""

    max_bytes: int
    oldest_first: bool  # let the oldest passes go; else the pass that went over it is refused

    def check(self, store: PassStore) -> None:
        """Let passes go until the rest fits.

        Raises:
            BudgetError: the newest pass alone does not fit, or no pass is to be let go. Its maps
                are let go; those of older passes stay.
        """
        held = store.count()
        while held > self.max_bytes and self.oldest_first and len(store.passes) > 1:
            store.let_go()
            held = store.count()
        if held <= self.max_bytes:
            return
        newest = store.let_go(newest=True)[0]
        older = f", with {len(store.passes)} older ones" if store.passes else ""
        raise BudgetError(
            f"the maps of step {newest.step}{older} take {held:,} bytes, more than "
            f"max_bytes={self.max_bytes:,}; capture fewer layers, kinds or filters, a narrower "
            "dtype=, or use when_full='oldest' to let older passes go first",
            step=newest.step,
            bytes=held,
        )


def given_budget(max_bytes: Any, when_full: Any) -> Budget | None:
    """`max_bytes=` and `when_full=`, checked; None for no limit."""
    if when_full not in ("error", "oldest"):
        raise ArgumentError(f"when_full must be 'error' or 'oldest', not {when_full!r}")
    if max_bytes is None:
        if when_full == "oldest":
            raise ArgumentError(
                f"when_full={when_full!r} says what goes when max_bytes= is reached: give both"
            )
        return None
    if not is_int(max_bytes) or max_bytes < 1:
        raise ArgumentError(f"max_bytes must be a positive int (bytes), not {max_bytes!r}")
    return Budget(max_bytes, when_full == "oldest")
