"""`stream`: rows for training straight from a model, without a disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fmapkit.data._batches import Batch, Batches
from fmapkit.data._fingerprint import of_model
from fmapkit.data._pool import Pool, Slots
from fmapkit.data._riding import Riding
from fmapkit.data._rows import Keep, Mask, Rows, Taken
from fmapkit.data._rows import Pool as Pooling
from fmapkit.data._run import Run
from fmapkit.data.loader import Block, RowLoader, Wanted
from fmapkit.errors import ArgumentError, StoreError, listed
from fmapkit.kinds import Kind


def stream(
    model: nn.Module,
    loader: Iterable[Any],
    layers: Any,
    batch: int,
    *,
    kinds: Kind | Iterable[Kind] = "activation",
    filters: int | Iterable[int] | Mapping[str, int | Iterable[int]] | None = None,
    pool: Pooling | None = None,
    mask: Mask | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | int | None = None,
    keep: Keep = (),
    call: Callable[[nn.Module, Any], Any] | None = None,
    stop: bool = False,
    shuffle: str | None = "buffer",
    buffer: int = 2**16,
    seed: int = 0,
    rank: int | None = None,
    world: int | None = None,
    drop_last: bool = False,
) -> RowLoader:
    """Batches of a layer's rows, made as they are needed by running the model.

    A buffer is filled with the rows of some batches, rows are drawn from it, and as half of it is
    used up the model runs again: what trainings of sparse autoencoders do.

    ```python
    for x in stream(model, loader, "blocks.3", 4096, mask="attention_mask"):   # (4096, d)
        ...
    ```

    Args:
        model: any module, in eval mode.
        loader: as in `extract`. It is iterated in its order in each epoch, which has to be the same
            for a state to be of use.
        layers: as in `capture`. A single name gives tensors, anything else dicts: by layer, with
            what is kept, and of sequences with "sample" and "position".
        batch: rows of each batch.
        kinds: as in `extract`.
        filters: as in `extract`.
        pool: as in `extract`.
        mask: as in `extract`.
        dtype: as in `extract`.
        device: as in `extract`; rows stay there.
        keep: as in `extract`; given in the dict, numbers only.
        call: as in `extract`.
        stop: as in `extract`; end each forward at the last wanted map.
        shuffle: "buffer", or None for the loader's order.
        buffer: rows of that buffer.
        seed: of the order.
        rank: the part of this rank: every `world`-th batch; None for torch.distributed's. Ranks may
            get different numbers of rows.
        world: of how many ranks.
        drop_last: leave out a last batch that is not full.

    Returns:
        A `RowLoader`, with `state_dict`.

    Raises:
        ArgumentError: an argument cannot be meant, or rows do not go together.
    """
    rows = Rows(pool, mask, dtype, keep)
    run = Run(model, layers, kinds, filters, stop, rows, Riding((), False), device, call)
    batches = Batches(loader)
    if name := batches.shuffled:
        raise ArgumentError(
            f"the loader shuffles ({name}): which rows are in the buffer could not be told; make "
            "it with shuffle=False, the buffer shuffles"
        )
    single = isinstance(layers, str) and not rows.keep and not any(c in layers for c in "*?[")
    return RowLoader(
        LiveRows(run, batches, of_model(run.model), single),
        batch,
        shuffle=shuffle,
        buffer=buffer,
        seed=seed,
        rank=rank,
        world=world,
        drop_last=drop_last,
        single=single,
    )


@dataclass(frozen=True)
class LiveRows:
    """Rows of a model's maps; a block is a batch of the loader.

    Attributes:
        single: whether there has to be one array only.
    """

    run: Run
    batches: Batches
    fingerprint: dict[str, str]
    single: bool

    def sizes(self) -> list[int] | None:
        """Not known before the model has run."""
        return None

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
        """In memory of its own; for rows to begin with, the model runs again on their batches."""
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
