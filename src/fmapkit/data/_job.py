"""One call of `extract`: what is in the store already, whose units are whose, units to the writer.

What running analyses had seen before is taken over in `_riding.py`.
"""

from __future__ import annotations

import platform
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn

import fmapkit
from fmapkit._lazy import needed
from fmapkit.data._batches import Batch, Batches, none_there
from fmapkit.data._fingerprint import differences, digest
from fmapkit.data._manifest import Manifest, UnitRecord
from fmapkit.data._place import Place, zarr_module
from fmapkit.data._ranks import Ranks
from fmapkit.data._rows import Taken, check_same
from fmapkit.data._run import Run
from fmapkit.data._writer import Unit, Writer, sent
from fmapkit.errors import ArgumentError, DistributedError, StoreError, StoreMismatchError

_UNIT_BYTES = 2**24  # of the largest array, about, if that takes no more batches than
_UNIT_BATCHES = 64  # these: what is lost at most when the process is killed
_UNITS = 20_000  # more of them take long to list

Passes = Iterable[tuple[Batch, Taken]]


@dataclass(frozen=True)
class Job:
    """One call of `extract`, its arguments checked."""

    run: Run
    place: Place
    batches: Batches
    asked: Mapping[str, Any]  # the call, described: the store has to be of the same one
    layers: Any
    kinds: Any
    batches_per_commit: int | None
    resume: bool  # whether to go on with what is there
    check: bool  # whether to compare what the loader gives with what it gave before
    progress: bool

    def extract(self, ranks: Ranks) -> None:
        """All of it: agree, run, wait for each other, finish."""
        self._agree(ranks)
        found: Manifest | None = ranks.first(self._begun)
        if found is None and ranks.size == 1:
            with closing(self.run.over(self.batches.read(lambda number: True))) as passes:
                first = next(passes, None)
                if first is None:
                    raise none_there()
                self._units(self._create(*first), {}, chain([first], passes), ranks)
            return
        manifest: Manifest = ranks.first(self._probe) if found is None else found
        # A loader without an index is compared while it is iterated.
        if self.check and (self.batches.indexed or manifest.complete):
            self._check_batch(self.batches.first(), manifest.first)
        records: dict[int, UnitRecord] = ranks.first(self.place.records)
        self.run.riding.resume(self.place, records, ranks.rank, ranks.size)
        if manifest.complete:
            ranks.first(self.place.tidy)  # of a run that was killed while it did that
            return

        def skipped(batch: Batch) -> None:
            if self.check and batch.number == 0:
                self._check_batch(batch, manifest.first)
            record = records.get(batch.number // manifest.batches_per_unit)
            if self.check and record and batch.number % manifest.batches_per_unit == 0:
                self._check_batch(batch, record.digest)

        mine = _share(records, manifest.batches_per_unit, ranks)
        with closing(self.run.over(self.batches.read(mine, skipped))) as passes:
            self._units(manifest, records, passes, ranks)

    # -- beginning, and going on -------------------------------------------------------------------

    def _begun(self) -> Manifest | None:
        """What an earlier run of the same call has begun; None where nothing is there."""
        found = self.place.manifest()
        if found is None:
            return None
        if not self.resume:
            raise StoreMismatchError(
                f"{self.place} holds features already, and resume=False begins anew: remove it, "
                "or give another place"
            )
        if words := differences(found.asked, self.asked):
            raise StoreMismatchError(
                f"{self.place} holds features of another call: {'; '.join(words)}. Give another "
                "place, or the same model and arguments"
            )
        if self.batches_per_commit not in (None, found.batches_per_unit) and not found.complete:
            raise StoreMismatchError(
                f"{self.place} was begun with batches_per_commit={found.batches_per_unit}, and "
                f"goes on with that only, not with {self.batches_per_commit}"
            )
        return found

    def _check_batch(self, batch: Batch, expected: str) -> None:
        """Refuse a batch that is not the one that the loader gave before, by its digest."""
        if expected and digest(batch.data) != expected:
            raise StoreMismatchError(
                f"batch {batch.number} of the loader is not the one that {self.place} was made of: "
                "other data, another order, or augmentation by chance. Give the same data in the "
                "same order, or check=False where they are meant to differ"
            )

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
        if any(hasattr(p, "to_local") for p in self.run.model.parameters()):
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
            batches_per_unit=self.batches_per_commit or _batches_per_unit(self.batches, taken),
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
        self.place.create(manifest)
        return manifest

    def _check_layers(self, taken: Taken) -> None:
        """Each layer that was asked for by its name has to be there."""
        there = {spec.layer for spec, _ in taken.arrays}
        absent = _absent(self.run.model, self.layers, there)
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

    # -- units -------------------------------------------------------------------------------------

    def _units(
        self, manifest: Manifest, records: Mapping[int, UnitRecord], passes: Passes, ranks: Ranks
    ) -> None:
        """Run this rank's batches, have their rows written, and finish the store.

        Args:
            records: of units that are there.
            passes: over the batches that are this rank's.
        """
        shown = ranks.size if self.progress and ranks.rank == 0 else 0
        with (
            _bar(shown, manifest, records) as bar,
            Writer(self.place, manifest, self.run.riding) as writer,
        ):
            unit: Unit | None = None
            for batch, taken in _on_host(passes, manifest):
                if unit is None:
                    unit = writer.unit(batch.number // manifest.batches_per_unit, batch.start)
                    unit.digest = digest(batch.data)
                self.run.rows.warn_of_overflow(taken)
                unit.add(taken)
                if bar is not None:
                    bar.update(taken.samples)
                if manifest.ends_unit(batch.number):
                    writer.put(unit)
                    unit = None
            if unit is not None:
                writer.put(unit)
        totals = ranks.gather(self.batches.total)
        ranks.first(lambda: self._finish(manifest, totals))

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


def _share(done: Collection[int], batches: int, ranks: Ranks) -> Callable[[int], bool]:
    """What tells which batches are this rank's: of the units that are not done, each in turn."""
    before = sorted(done)

    def mine(number: int) -> bool:
        unit = number // batches
        return unit not in done and (unit - bisect_left(before, unit)) % ranks.size == ranks.rank

    return mine


def _absent(model: nn.Module, layers: Any, there: Collection[str]) -> list[str]:
    """The layers that were asked for by name and gave no map."""
    names = list(layers) if isinstance(layers, (list, tuple)) else [layers]
    first = {id(m): n for n, m in reversed(list(model.named_modules()))}
    modules = dict(model.named_modules(remove_duplicate=False))
    found = []
    for name in names:
        if not isinstance(name, str) or any(c in name for c in "*?["):
            continue
        canonical = first.get(id(modules.get(name)), name)
        if not any(t == canonical or t.startswith(f"{canonical}.") for t in there):
            found.append(name)
    return found


def _batches_per_unit(loader: Batches, first: Taken) -> int:
    """How many batches are written and committed together."""
    sizes = [spec.row_bytes * len(rows) for spec, rows in first.arrays]
    number = min(_UNIT_BATCHES, max(1, _UNIT_BYTES // max(1, *sizes)))
    if loader.samples is not None and loader.batch_size is not None:
        batches = -(-loader.samples // loader.batch_size)
        number = min(max(number, batches // _UNITS), max(1, batches))
    return number


def _on_host(passes: Passes, manifest: Manifest) -> Iterator[tuple[Batch, Taken]]:
    """The same in the host's memory, where a batch arrives while the next one runs.

    The last one of a unit is waited for, so that its analyses have seen what is in it, and no more.
    """
    behind: tuple[Batch, Taken, list[Any]] | None = None
    for batch, taken in passes:
        if behind is not None:
            yield _arrived(*behind)
            behind = None
        check_same(taken, manifest.arrays, manifest.fields)
        _check_size(batch, taken, manifest)
        rows, copies = sent(taken)
        if copies and not manifest.ends_unit(batch.number):
            behind = batch, rows, copies
        else:
            yield _arrived(batch, rows, copies)
    if behind is not None:
        yield _arrived(*behind)


def _arrived(batch: Batch, taken: Taken, copies: list[Any]) -> tuple[Batch, Taken]:
    for copy in copies:
        copy.synchronize()
    return batch, taken


def _check_size(batch: Batch, taken: Taken, manifest: Manifest) -> None:
    if not manifest.regular:
        return
    size, total = manifest.batch_size, manifest.samples
    assert size is not None and total is not None
    expected = min(size, total - batch.number * size)
    if taken.samples != expected:
        raise StoreError(
            f"batch {batch.number} has {taken.samples} samples, and the loader says {expected}: "
            "collate_fn leaves some out, or adds some. Give the loader as a plain iterable of "
            "batches, which may be of any size"
        )


def _bar(ranks: int, manifest: Manifest, records: Mapping[int, UnitRecord]) -> Any:
    """A bar of all samples; of one of several ranks, of about its share of those to come."""
    if not ranks:
        return nullcontext()
    says = "progress=True needs tqdm: pip install fmapkit[data], or give progress=False"
    tqdm = needed("tqdm.auto", says).tqdm
    done, total = sum(record.samples for record in records.values()), manifest.samples
    if ranks > 1:
        done, total = 0, None if total is None else -(-(total - done) // ranks)
    what = "extract" if ranks == 1 else "extract, rank 0"
    return tqdm(total=total, initial=done, unit="samples", desc=what)
