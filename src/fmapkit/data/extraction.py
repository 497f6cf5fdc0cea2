"""`extract`: a data set through a model, some layers' features in a store."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fmapkit
from fmapkit.data._batches import Batch, Batches
from fmapkit.data._fingerprint import describe, differences, digest, of_model
from fmapkit.data._manifest import Manifest, UnitRecord
from fmapkit.data._place import Place, zarr_module
from fmapkit.data._ranks import Ranks, joined
from fmapkit.data._resuming import Share, begun, check_batch
from fmapkit.data._riding import Riding
from fmapkit.data._rows import POOLS, Keep, Mask, Pool, Rows, Taken, check_keep
from fmapkit.data._run import Run, batches_per_unit, default_call
from fmapkit.data.features import Features
from fmapkit.errors import (
    ArgumentError,
    DistributedError,
    StoreError,
    check_module,
    check_positive,
)
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
        call: `call(model, batch)` runs the model, where the default does not fit.
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
    model = checked_model(model, pool)
    if batches_per_commit is not None:
        check_positive(batches_per_commit=batches_per_commit)
    kinds = kinds if isinstance(kinds, str) else tuple(kinds)
    place = Place(to, storage_options, _codecs(compress))
    batches = Batches(loader)
    riding = Riding(analyses, resume)
    kept = check_keep(keep)
    run = Run(
        model,
        lambda: fmapkit.capture(model, layers, kinds=kinds, filters=filters, stop=stop),
        Rows(pool, mask, dtype, kept),
        riding,
        device_of(model, device),
        call or default_call(model, kept),
    )
    asked = {
        **of_model(model),
        "layers": describe(layers if isinstance(layers, (list, tuple)) else [layers], model),
        "kinds": describe([kinds] if isinstance(kinds, str) else sorted(kinds)),
        "filters": describe(filters),
        "pool": describe(pool),
        "mask": describe(mask),
        "dtype": describe(dtype),
        "keep": describe(kept),
        "call": describe(call),
        "compress": describe(compress if compress is None or isinstance(compress, str) else "own"),
        "analyses": riding.names,
        "loader": batches.describe(),
    }
    made = _Call(run, place, batches, asked, layers, kinds, batches_per_commit, resume, check)
    try:
        with joined() as ranks:
            made.extract(ranks, progress)
    finally:
        run.close()
    return Features(to, storage_options=storage_options)


@dataclass(frozen=True)
class _Call:
    """One call of `extract`, its arguments checked."""

    run: Run
    place: Place
    batches: Batches
    asked: Mapping[str, Any]
    layers: Any
    kinds: Any
    batches_per_commit: int | None
    resume: bool
    check: bool

    def extract(self, ranks: Ranks, progress: bool) -> None:
        """All of it: agree, run, wait for each other, finish."""
        self._agree(ranks)
        found: Manifest | None = ranks.first(
            lambda: begun(self.place, self.asked, self.resume, self.batches_per_commit)
        )
        if found is None and ranks.size == 1:
            manifest = self.run.begin(self.batches, self._create)
        elif found is None:
            manifest = ranks.first(self._probe)
            self._compare(manifest)
        else:
            self._compare(found)
            manifest = found
        records: dict[int, UnitRecord] = ranks.first(self.place.records)
        self.run.riding.resume(self.place, records, ranks.rank, ranks.size)
        if manifest.complete:
            ranks.first(self.place.tidy)  # of a run that was killed while it did that
        else:
            share = Share(set(records), manifest.batches_per_unit, ranks.rank, ranks.size)
            self.run.units(
                self.batches,
                self.place,
                manifest,
                share,
                records,
                self.check,
                ranks.size if progress and ranks.rank == 0 else 0,
            )
            totals = ranks.gather(self.batches.total)
            ranks.first(lambda: self._finish(manifest, totals))

    def _agree(self, ranks: Ranks) -> None:
        """Refuse ranks that would not write one store."""
        if (self.resume or ranks.size > 1) and (name := self.batches.shuffled):
            raise ArgumentError(
                f"the loader shuffles ({name}), so which samples are done could not be told when "
                "an interrupted run goes on, or to other ranks; make it with shuffle=False (and "
                "shuffle when reading: Features.loader), or give resume=False in one process"
            )
        if self.batches.divided:
            raise ArgumentError(
                "the loader has a DistributedSampler, which gives this rank a part of the data; "
                "give each rank the whole data set: extract shares it out itself"
            )
        if ranks.size == 1:
            return
        if self.run.spread():
            raise DistributedError(
                "the model is spread over ranks, each of its passes is one of all ranks, and they "
                "may have different numbers of batches; load the whole model on each rank"
            )
        for rank, other in enumerate(ranks.gather(dict(self.asked))):
            if words := differences(other, self.asked):
                raise DistributedError(
                    f"ranks {rank} and {ranks.rank} were asked for different things: "
                    + "; ".join(words).replace(" then,", f" on rank {rank},")
                )

    def _compare(self, manifest: Manifest) -> None:
        """Refuse a loader that gives other data than when the store was begun."""
        # A loader without an index is compared while it is iterated.
        if self.check and (self.batches.indexed or manifest.complete):
            check_batch(self.batches.first(), manifest.first, self.place)

    def _probe(self) -> Manifest:
        batch = self.batches.first()
        return self._create(batch, self.run.probe(batch))

    def _create(self, batch: Batch, taken: Taken) -> Manifest:
        """Begin the store, once the first batch has shown what there is."""
        self._check_layers(taken)
        zarr = zarr_module()
        manifest = Manifest(
            arrays=tuple(spec for spec, _ in taken.arrays),
            fields=tuple(spec for spec, _ in taken.fields),
            batches_per_unit=1,
            batch_size=self.batches.batch_size,
            samples=self.batches.samples,
            asked=self.asked,
            first=digest(batch.data),
            versions={
                "fmapkit": fmapkit.__version__,
                "torch": str(torch.__version__),
                "zarr": zarr.__version__,
                "python": platform.python_version(),
            },
        )
        number = self.batches_per_commit or batches_per_unit(manifest, taken)
        manifest = replace(manifest, batches_per_unit=number)
        self.place.create(manifest)
        return manifest

    def _check_layers(self, taken: Taken) -> None:
        """Each layer that was asked for by its name has to be there."""
        there = {spec.layer for spec, _ in taken.arrays}
        absent = self.run.absent(self.layers, there)
        if not absent and taken.arrays:
            return
        said = ", ".join(map(repr, absent)) or repr(self.layers)
        reasons = [f"{m.layer!r}: {m.reason}" for m in self.run.missed if m.layer in absent]
        raise ArgumentError(
            f"no map of kinds={self.kinds!r} came from {said}"
            + (f" ({'; '.join(reasons)})" if reasons else "")
            + "; where no nonlinearity follows a layer it has no activation: kinds='output' takes "
            "what each layer returns, kinds='preactivation' what its filters gave"
        )

    def _finish(self, manifest: Manifest, totals: list[int | None]) -> None:
        records = self.place.records()
        total = max(t for t in totals if t is not None)
        there = sum(record.batches for record in records.values())
        units = set(range(-(-total // manifest.batches_per_unit)))
        if set(records) != units or there != total or len(set(totals)) != 1:
            raise StoreError(
                f"the loader came to its end after {total} batches, and {self.place} holds {there}:"
                " it is left as it is, incomplete. Did the loader give fewer batches than before, "
                "or others on other ranks?"
            )
        self.run.riding.tidy(self.place, records)
        self.place.finish(manifest, records.values())


def checked_model(model: Any, pool: Any) -> nn.Module:
    """The model that runs.

    Raises:
        ArgumentError: it is none, or is in training mode; `pool` is nothing that pools.
    """
    check_module("extract", model)
    # The forward of DistributedDataParallel talks to other ranks.
    plain: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
    if plain.training:
        raise ArgumentError(
            "the model is in training mode: dropout would draw, and batch norms would learn from "
            "the data; call model.eval() first"
        )
    if pool is not None and not callable(pool) and pool not in POOLS:
        raise ArgumentError(f"pool must be one of {POOLS}, or a function of a map, not {pool!r}")
    return plain


def device_of(model: nn.Module, given: Any) -> torch.device:
    """Where batches go.

    Raises:
        ArgumentError: the model is elsewhere.
    """
    tensors = [*model.parameters(), *model.buffers()]
    there = tensors[0].device if tensors else torch.device("cpu")
    if given is None:
        return there
    try:
        device = torch.device(given)
    except (RuntimeError, TypeError) as error:
        raise ArgumentError(f"device must name a torch device, not {given!r}: {error}") from None
    if tensors and device.type != there.type:
        raise ArgumentError(
            f"device={given!r}, and the model is on {there}: move it, model.to({given!r})"
        )
    return device


def _codecs(compress: Any) -> Any:
    if compress is None or not isinstance(compress, str):
        return compress
    if compress == "zstd":
        return zarr_module().codecs.ZstdCodec(level=1)
    raise ArgumentError(f"compress must be None, 'zstd', or Zarr codecs, not {compress!r}")
