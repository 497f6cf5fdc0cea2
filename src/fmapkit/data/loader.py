"""`RowLoader`: batches of rows in a shuffled order, from a store or straight from a model.

Rows come in blocks: the units of a store, the batches of a loader. A buffer is filled with blocks,
rows are drawn from it, and as half of it is used up it is filled again. Every draw is a function of
(seed, epoch, rank, number of the refill), so the order is the same each time, and a state is the
identity of the rows in the buffer: they are read (or worked out) again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fmapkit.data._arrays import StoredArray
from fmapkit.data._batches import Batch, Batches
from fmapkit.data._fingerprint import differences
from fmapkit.data._pool import NO_ROWS, Pool, Slots, Views
from fmapkit.data._rows import Taken
from fmapkit.data._run import Run
from fmapkit.errors import ArgumentError, StoreError, check_positive, is_int, listed

# Units of each rank: of fewer, the one that some ranks have more is much of the rows.
_FEW = 8

# Of blocks whose sizes are known the numbers, in order; else whether that one is.
Wanted = Sequence[int] | Callable[[int], bool]
Block = tuple[int, dict[str, Tensor]]  # its number, and the same rows of each array


class StoredRows:
    """Rows of arrays of a store, which have the same number of them.

    A block is a unit, or a part of one where there are few for so many ranks.
    """

    def __init__(self, arrays: Mapping[str, StoredArray]) -> None:
        for name, array in arrays.items():
            if array.dtype is None:
                raise ArgumentError(f"{name!r} is text, which cannot be put into a batch of rows")
        self._arrays = dict(arrays)
        self._bounds = next(iter(arrays.values())).bounds
        self.parts = 1  # of each unit

    def share(self, world: int) -> None:
        """Have a part of each unit for each rank, where there are few.

        Raises:
            ArgumentError: there are fewer rows than ranks.
        """
        rows = sum(self.sizes())
        if 0 < rows < world:
            raise ArgumentError(f"there are {rows} rows for world={world} ranks: some get none")
        if len(self._bounds) < _FEW * world:
            ends = (np.linspace(*unit, world + 1).astype(int).tolist() for unit in self._bounds)
            self._bounds, self.parts = [part for cut in ends for part in pairwise(cut)], world

    def sizes(self) -> list[int]:
        """Rows of each block."""
        return [last - first for first, last in self._bounds]

    def blocks(self, wanted: Wanted) -> Iterator[Block]:
        assert not callable(wanted)
        for number in wanted:
            bounds = self._bounds[number]
            yield number, {name: array.view(*bounds) for name, array in self._arrays.items()}

    def pool(self, ids: Tensor) -> Pool:
        """A buffer that begins with these rows: number of block and row in it, (rows, 2).

        In the store's own memory, where it can be.
        """
        starts = np.asarray([first for first, _ in self._bounds], np.int64)
        if all(array.mapped for array in self._arrays.values()):
            return Views(ids, starts, self._gather)
        rows = starts[ids[:, 0].numpy()] + ids[:, 1].numpy()
        return Slots(self._gather(rows) if len(ids) else {}, ids)

    def _gather(self, rows: np.ndarray[Any, Any]) -> dict[str, Tensor]:
        return {name: array.gather(rows) for name, array in self._arrays.items()}

    def describe(self) -> dict[str, Any]:
        """What a state has to agree with."""
        arrays = {n: [list(a.shape), str(a.dtype)] for n, a in self._arrays.items()}
        return {"rows of": arrays, "units": len(self._bounds)}


@dataclass(frozen=True)
class LiveRows:
    """Rows of a model's maps; a block is a batch of the loader."""

    run: Run
    batches: Batches
    fingerprint: dict[str, str]
    single: bool  # whether there has to be one array only
    parts = 1  # of each batch

    def share(self, world: int) -> None:
        """Each rank has its own batches of the loader."""

    def sizes(self) -> None:
        """Not known before the model has run."""

    def blocks(self, wanted: Wanted) -> Iterator[Block]:
        assert callable(wanted)
        for batch, taken in self.run.over(self.batches.read(wanted)):
            yield batch.number, self._rows(batch, taken)

    def _rows(self, batch: Batch, taken: Taken) -> dict[str, Tensor]:
        if not taken.arrays:
            raise ArgumentError(
                "no map came of the layers asked for; where no nonlinearity follows a layer it has "
                "no activation: kinds='output' takes what each layer returns"
            )
        fields = [] if self.single else taken.fields
        every = [(spec.name, spec.per) for spec, _ in taken.arrays]
        every += [(spec.name, spec.per) for spec, _ in fields]
        if len({per for _, per in every}) > 1:
            raise ArgumentError(
                "some of these have rows of tokens and some of samples, which do not go together: "
                + ", ".join(f"{name} ({per})" for name, per in every)
            )
        layers = [spec.layer for spec, _ in taken.arrays]
        rows = {
            spec.layer if layers.count(spec.layer) == 1 else spec.name: v
            for spec, v in taken.arrays
        }
        if self.single and len(rows) > 1:
            raise ArgumentError(
                f"one layer was asked for, and gives {len(rows)} arrays: {listed(rows)}; choose "
                "with kinds=, or give a list of layers for dicts of rows",
                candidates=rows,
            )
        for spec, values in fields:
            if spec.dtype == "string":
                raise ArgumentError(f"keep={spec.name!r} is text, which no batch of rows can hold")
            rows[spec.name] = torch.from_numpy(values)
        return rows

    def pool(self, ids: Tensor) -> Pool:
        """As above, in memory of its own; the model runs again on the batches of these rows."""
        return Slots(self._take(ids) if len(ids) else {}, ids)

    def _take(self, ids: Tensor) -> dict[str, Tensor]:
        needed = set(ids[:, 0].tolist())
        out: dict[str, Tensor] = {}
        for number, rows in self.blocks(lambda n: n in needed):
            here = (ids[:, 0] == number).nonzero().squeeze(1)
            for name, values in rows.items():
                if name not in out:
                    out[name] = values.new_empty((len(ids), *values.shape[1:]))
                picked = values[ids[here, 1].to(values.device)]
                out[name][here.to(values.device)] = picked
            needed.discard(number)
        if needed:
            raise StoreError(
                f"the loader does not give batch {min(needed)} any more, which the state needs"
            )
        return out

    def describe(self) -> dict[str, Any]:
        return {**self.fingerprint, "loader": self.batches.describe()}


RowSource = StoredRows | LiveRows


class RowLoader:
    """Batches of rows; iterated anew it goes on to the next epoch, in another order.

    So it does where an epoch was broken off.

    Made by `Features.loader` and by `stream`, which say what the other arguments mean.

    Args:
        source: of the rows.
        single: give tensors in the place of dicts.

    Raises:
        ArgumentError: a number cannot be meant.
    """

    def __init__(
        self,
        source: RowSource,
        batch: int,
        *,
        shuffle: str | None = "buffer",
        buffer: int = 2**16,
        seed: int = 0,
        rank: int | None = None,
        world: int | None = None,
        drop_last: bool = False,
        single: bool = False,
    ) -> None:
        check_positive(batch=batch, buffer=buffer)
        if shuffle not in ("buffer", None):
            raise ArgumentError(f"shuffle must be 'buffer' or None, not {shuffle!r}")
        if shuffle and buffer < 2 * batch:
            raise ArgumentError(
                f"buffer={buffer} is less than two batches of {batch} rows: half of it is drawn "
                "before it is filled again"
            )
        if not is_int(seed):
            raise ArgumentError(f"seed must be an int, not {seed!r}")
        joined = dist.is_available() and dist.is_initialized()
        self._rank = rank if rank is not None else dist.get_rank() if joined else 0
        self._world = world if world is not None else dist.get_world_size() if joined else 1
        if not 0 <= self._rank < self._world:
            raise ArgumentError(f"rank must be from 0 to {self._world - 1}, not {self._rank}")
        source.share(self._world)
        self._source = source
        self._batch = batch
        self._shuffle = shuffle == "buffer"
        self._capacity = buffer if shuffle else batch
        self._seed = seed
        self._drop_last = drop_last
        self._single = single
        self._epoch = 0
        self._at = _Position(self._source.pool(NO_ROWS))
        self._going = False  # whether a state was loaded, and the next iteration goes on from it

    def __len__(self) -> int:
        """Batches of an epoch, the same on every rank.

        Raises:
            TypeError: how many rows come is not known.
        """
        _, limit = self._plan()
        if limit is None:
            raise TypeError("how many rows a model will give is not known before it has run")
        return limit

    def __iter__(self) -> Iterator[Any]:
        """The rest of the epoch where a state was loaded, else an epoch from its beginning."""
        if not self._going:
            self._epoch += self._at.batches > 0  # one that was broken off
            self._at = _Position(self._source.pool(NO_ROWS))
        self._going = False
        position = self._at
        pool = position.pool
        order, limit = self._plan()
        skip, rank, world = position.blocks, self._rank, self._world
        blocks = self._source.blocks(
            order[skip:]
            if order is not None
            else lambda number: number % world == rank and number // world >= skip
        )
        while limit is None or position.batches < limit:
            if not position.left:
                self._refill(pool, blocks, position)
                if not position.left:
                    break
            count = min(self._batch, position.left)
            rows = pool.pop(count)
            position.left -= count
            if count < self._batch and self._drop_last:
                break
            position.batches += 1
            yield next(iter(rows.values())) if self._single else rows
        self._epoch += 1
        self._at = _Position(self._source.pool(NO_ROWS))

    def _refill(self, pool: Pool, blocks: Iterator[Block], position: _Position) -> None:
        """Fill the buffer, draw the order of what is in it, and say how much of it to give."""
        ended = False
        while len(pool) < max(self._capacity, self._batch):
            block = next(blocks, None)
            if block is None:
                ended = True
                break
            pool.add(*block, self._capacity)
            position.blocks += 1
        if self._shuffle:
            drawn = self._generator(self._epoch, self._rank, position.refills)
            pool.reorder(torch.randperm(len(pool), generator=drawn))
        position.refills += 1
        if ended:
            position.left = len(pool)
            return
        part = len(pool) // 2 if self._shuffle else len(pool)
        position.left = max(1, part // self._batch) * self._batch

    def _generator(self, *numbers: int) -> torch.Generator:
        text = repr((self._seed, *numbers)).encode()
        number = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
        return torch.Generator().manual_seed(number & (2**63 - 1))

    def _plan(self) -> tuple[list[int] | None, int | None]:
        """This rank's blocks in the order of the epoch, and how many batches that is.

        As many as of the rank that has fewest, so that no rank waits for another.
        """
        sizes = self._source.sizes()
        if sizes is None:
            return None, None
        parts, world = self._source.parts, self._world
        order = list(range(len(sizes) // parts))
        if self._shuffle:
            order = torch.randperm(len(order), generator=self._generator(self._epoch)).tolist()
        of_ranks = [order[rank::world] for rank in range(world)]
        if parts > 1:  # which one goes round
            at = list(enumerate(order))
            of_ranks = [[n * parts + (rank + i) % parts for i, n in at] for rank in range(world)]
        rows = [sum(sizes[n] for n in mine) for mine in of_ranks]
        counts = [n // self._batch if self._drop_last else -(-n // self._batch) for n in rows]
        return of_ranks[self._rank], min(counts)

    # -- states -----------------------------------------------------------------------------------

    def _config(self) -> dict[str, Any]:
        return {
            "batch": self._batch,
            "buffer": self._capacity,
            "shuffle": self._shuffle,
            "seed": self._seed,
            "rank": self._rank,
            "world": self._world,
            "drop_last": self._drop_last,
            **self._source.describe(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Where the order is: tensors and plain values, 16 bytes for each row of the buffer."""
        at = self._at
        return {
            "config": self._config(),
            "epoch": self._epoch,
            "ids": at.pool.ids,
            "left": at.left,
            "blocks": at.blocks,
            "refills": at.refills,
            "batches": at.batches,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there: the next iteration gives what would have come.

        Raises:
            ArgumentError: the state is of other rows, or of other arguments.
        """
        then, now = state["config"], self._config()
        if words := differences(then, now):
            raise ArgumentError(f"the state is of another loader: {'; '.join(words)}")
        self._epoch = int(state["epoch"])
        ids: Tensor = state["ids"]
        self._at = _Position(
            self._source.pool(ids),
            *(int(state[k]) for k in ("left", "blocks", "refills", "batches")),
        )
        self._going = True


@dataclass
class _Position:
    """How far an epoch is."""

    pool: Pool  # the rows in the buffer, in the order in which they will be given
    left: int = 0  # how many of these are given before it is filled again
    blocks: int = 0  # how many blocks have gone into it
    refills: int = 0  # how often it was filled
    batches: int = 0  # how many batches were given
