"""`stream`: rows for training straight from a model, without a disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from fmapkit.data._batches import Batches
from fmapkit.data._fingerprint import of_model
from fmapkit.data._riding import Riding
from fmapkit.data._rows import Keep, Mask, Pool, Rows
from fmapkit.data._run import Run
from fmapkit.data.loader import LiveRows, RowLoader
from fmapkit.errors import ArgumentError
from fmapkit.kinds import Kind


def stream(
    model: nn.Module,
    loader: Iterable[Any],
    layers: Any,
    batch: int,
    *,
    kinds: Kind | Iterable[Kind] = "activation",
    filters: int | Iterable[int] | Mapping[str, int | Iterable[int]] | None = None,
    pool: Pool | None = None,
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
