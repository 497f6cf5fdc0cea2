"""A data set through a model: `extract` puts features into a store, `stream` gives them at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fmapkit.data._batches import Batches
from fmapkit.data._fingerprint import describe, of_model
from fmapkit.data._job import Job
from fmapkit.data._place import Place, zarr_module
from fmapkit.data._ranks import joined
from fmapkit.data._riding import Riding
from fmapkit.data._rows import Keep, Mask, Pool, Rows
from fmapkit.data._run import Run
from fmapkit.data.features import Features
from fmapkit.data.loader import LiveRows, RowLoader
from fmapkit.errors import ArgumentError, check_positive
from fmapkit.kinds import Kind

if TYPE_CHECKING:
    from fmapkit import Analysis


def extract(
    model: nn.Module,
    loader: Iterable[Any],
    layers: Any = None,
    to: Any = "features.zarr",
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
    analyses: Analysis | Iterable[Analysis] = (),
    resume: bool = True,
    check: bool = True,
    compress: Any = None,
    batches_per_commit: int | None = None,
    progress: bool = True,
    storage_options: Mapping[str, Any] | None = None,
) -> Features:
    """Run a data set through a model, keep some layers' features in a Zarr store (extra: `data`).

    ```python
    features = extract(model, loader, ["layer3", "fc"], kinds="output", pool="mean")
    features["layer3"][:100]  # the first 100 samples, (100, filters)
    ```

    Killed at any moment, the store holds whole batches only, and the same call goes on where it
    was. A rank that torchrun has started does its share of the batches; the order of samples is the
    single process's. `docs/data.md` tells all of it, `docs/data-format.md` what lies on the disk.

    Args:
        model: any module, in eval mode.
        loader: what gives batches, each time it is iterated: a `DataLoader`, a list. A batch is a
            tensor, a tuple whose first entry is the model's input, or a dict of its arguments
            (those that `forward` takes, by name).
        layers: as in `capture`; None for all.
        to: a folder, a URL that fsspec knows (`s3://bucket/name`), or a Zarr store.
        kinds: as in `capture`; of a module that is no filter layer, "activation" means its output.
        filters: as in `capture`: only these.
        pool: "mean" or "max" over all axes but samples and filters (of sequences over what the
            mask keeps), or a function of a `FeatureMap` that returns a row for each sample.
        mask: of sequences: the batch's field, or a function of the batch, (samples, positions),
            true where there is no padding. Without `pool`, each position that is kept is a row,
            and the fields "sample" and "position" say which.
        dtype: in which floating-point features are stored; None for the model's own.
        device: where the batches go; None for where the model is.
        keep: fields of the batch to keep beside: names, or a dict of name -> key of the batch,
            index into it, or function of it. Numbers and text.
        call: `call(model, batch)` runs the model, once, where the default does not fit.
        stop: end each forward at the last wanted map (see `capture`); the rest does not run.
        analyses: running analyses, which see the maps of each pass before pooling, without padding;
            their state is kept with the features.
        resume: go on with what is there. False refuses a place where something is.
        check: compare the loader's batches with those that it gave before.
        compress: None, "zstd", or one or more Zarr codecs.
        batches_per_commit: how many batches are written and committed together; None for some MiB.
        progress: show a bar (on rank 0).
        storage_options: for fsspec, where `to` is a URL.

    Returns:
        The features, on every rank.

    Raises:
        ArgumentError: an argument cannot be meant, or a map has no row for each sample.
        StoreMismatchError: `to` holds features of another model, other data, or other arguments.
        StoreError: the store cannot be written; all that was committed before stays.
        DistributedError: ranks do not agree, or the model is spread over them.
    """
    if batches_per_commit is not None:
        check_positive(batches_per_commit=batches_per_commit)
    kinds = kinds if isinstance(kinds, str) else tuple(kinds)
    riding = Riding(analyses, resume)
    rows = Rows(pool, mask, dtype, keep)
    place = Place(to, storage_options, _codecs(compress))
    run = Run(model, layers, kinds, filters, stop, rows, riding, device, call)
    batches = Batches(loader)
    asked = {
        **of_model(run.model),
        "layers": describe(layers if isinstance(layers, (list, tuple)) else [layers], run.model),
        "kinds": describe([kinds] if isinstance(kinds, str) else sorted(kinds)),
        "filters": describe(filters),
        "pool": describe(pool),
        "mask": describe(mask),
        "dtype": describe(dtype),
        "keep": describe(rows.keep),
        "call": describe(call, pure=False),
        "compress": describe(compress if compress is None or isinstance(compress, str) else "own"),
        "analyses": riding.names,
        "loader": batches.describe(),
    }
    job = Job(
        run, place, batches, asked, layers, kinds, batches_per_commit, resume, check, progress
    )
    with joined() as ranks:
        job.extract(ranks)
    return Features(to, storage_options=storage_options)


def _codecs(compress: Any) -> Any:
    if compress is None or not isinstance(compress, str):
        return compress
    if compress == "zstd":
        return zarr_module().codecs.ZstdCodec(level=1)
    raise ArgumentError(f"compress must be None, 'zstd', or Zarr codecs, not {compress!r}")


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
