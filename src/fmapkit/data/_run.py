"""The loop: batches through the model, rows into units, units to the writer."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from fmapkit import CaptureWarning, FeatureMaps, capture
from fmapkit._lazy import needed
from fmapkit.data._batches import Batch, Batches, moved
from fmapkit.data._fingerprint import digest
from fmapkit.data._manifest import Manifest, UnitRecord
from fmapkit.data._place import Place
from fmapkit.data._resuming import Share, check_batch
from fmapkit.data._riding import Riding
from fmapkit.data._rows import Rows, Taken, check_same
from fmapkit.data._writer import Arriving, Unit, Writer
from fmapkit.errors import ArgumentError, StoreError

_UNIT_BYTES = 2**24  # of the largest array, about, if that takes no more batches than
_UNIT_BATCHES = 64  # these: what is lost at most when the process is killed
_UNITS = 20_000  # more of them take long to list
_TRIALS = 3  # of a batch whose pass could not be kept
_RUN_AGAIN = ".*a way through its code that no earlier pass had taken"


def batches_per_unit(manifest: Manifest, first: Taken) -> int:
    """How many batches are written and committed together."""
    sizes = [spec.row_bytes * len(rows) for spec, rows in first.arrays]
    number = min(_UNIT_BATCHES, max(1, _UNIT_BYTES // max(1, *sizes)))
    if manifest.samples is not None and manifest.batch_size is not None:
        batches = -(-manifest.samples // manifest.batch_size)
        number = min(max(number, batches // _UNITS), max(1, batches))
    return number


class Run:
    """A model that is run over batches, with what is taken of its maps."""

    def __init__(
        self,
        model: nn.Module,
        watch: Callable[[], capture],
        rows: Rows,
        riding: Riding,
        device: torch.device,
        call: Callable[[nn.Module, Any], Any],
    ) -> None:
        watch()  # has `capture` check its arguments before anything else happens
        self._model = model
        self._watch = watch
        self._rows = rows
        self.riding = riding
        self._device = device
        self._call = call
        self._pending: tuple[Batch, Taken] | None = None
        self._stream: Iterator[Batch] | None = None
        self._capture: Any = None
        self._maps: FeatureMaps | None = None
        self._keys: list[tuple[Any, ...]] = []  # of the maps of a pass
        self.missed: list[Any] = []

    def spread(self) -> bool:
        """Whether the model's parameters lie on several ranks."""
        return any(hasattr(p, "to_local") for p in self._model.parameters())

    def absent(self, layers: Any, there: Iterable[str]) -> list[str]:
        """The layers that were asked for by name and gave no map."""
        names = list(layers) if isinstance(layers, (list, tuple)) else [layers]
        there = list(there)
        first = {id(m): n for n, m in reversed(list(self._model.named_modules()))}
        modules = dict(self._model.named_modules(remove_duplicate=False))
        found = []
        for name in names:
            if not isinstance(name, str) or any(c in name for c in "*?["):
                continue
            canonical = first.get(id(modules.get(name)), name)
            if not any(t == canonical or t.startswith(f"{canonical}.") for t in there):
                found.append(name)
        return found

    # -- passes -----------------------------------------------------------------------------------

    def _taken(self, maps: FeatureMaps, batch: Batch, ride: bool = True) -> Taken:
        """Run a batch; where `capture` could not keep its pass, run it again.

        A pass that leaves the ways that are known is let go, and the next one is traced as a whole.
        So analyses are shown the maps after the pass, when all of them are there.
        """
        with torch.no_grad():
            for _ in range(_TRIALS):
                maps.clear()
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", _RUN_AGAIN, CaptureWarning)
                    self._call(self._model, moved(batch.data, self._device))
                found = list(maps)
                keys = [(fm.layer, fm.kind, fm.call, fm.path, fm.nonlinearity) for fm in found]
                self._keys = self._keys or keys
                if keys == self._keys:
                    break
            self.missed = maps.missed
            taken = self._rows.take(found, batch.data, batch.start)
            if ride:
                mask = self._rows.mask_of(batch.data)
                self.riding.show(found, mask, batch.start, taken.samples)
        return taken

    def probe(self, batch: Batch) -> Taken:
        """What a batch gives, in a pass of its own that no analysis sees."""
        with self._watch() as maps:
            return self._taken(maps, batch, ride=False)

    def over(self, stream: Iterator[Batch]) -> Iterator[tuple[Batch, Taken]]:
        """What each batch gives, to be read before the next one."""
        try:
            for batch in stream:
                yield batch, self._taken(self._open(), batch)
        finally:
            self.close()

    def _open(self) -> FeatureMaps:
        """The maps of a capture that is entered with the first batch, if there is one."""
        if self._maps is None:
            self._capture = self._watch()
            self._maps = self._capture.__enter__()
        return self._maps

    def close(self) -> None:
        """End the capture, if one is open."""
        if self._capture is not None:
            self._capture.__exit__(None, None, None)
        self._capture = self._maps = None

    def begin(self, batches: Batches, create: Callable[[Batch, Taken], Manifest]) -> Manifest:
        """Run the first batch, which says what the store is made of; `units` goes on with it."""
        self._stream = batches.read(lambda number: True)
        batch = next(self._stream, None)
        if batch is None:
            raise ArgumentError("the loader is empty: there is no batch to take features of")
        try:
            taken = self._taken(self._open(), batch)
            manifest = create(batch, taken)
        except BaseException:
            self.close()
            raise
        self._pending = (batch, taken)
        return manifest

    # -- units ------------------------------------------------------------------------------------

    def units(
        self,
        batches: Batches,
        place: Place,
        manifest: Manifest,
        compressors: Any,
        share: Share,
        records: Mapping[int, UnitRecord],
        check: bool,
        progress: int,
    ) -> None:
        """Run all batches of this rank, and have their rows written.

        Args:
            batches: of the loader.
            place: the store.
            manifest: of it.
            compressors: of its arrays.
            share: which batches are this rank's.
            records: of units that are there.
            check: whether to compare what the loader gives of these with what it gave before.
            progress: of how many ranks one shows a bar: this one; 0 for none.
        """

        def skipped(batch: Batch) -> None:
            if not check:
                return
            if batch.number == 0:
                check_batch(batch, manifest.first, place)
            record = records.get(batch.number // manifest.batches_per_unit)
            if record is not None and batch.number % manifest.batches_per_unit == 0:
                check_batch(batch, record.digest, place)

        bar = _bar(progress, manifest, records)
        stream = self._stream or batches.read(share, skipped)
        try:
            writer = Writer(place, manifest, compressors)
            try:
                self._fill(stream, writer, manifest, bar)
            except BaseException:
                # Whole units are still written; what went wrong is what counts.
                with suppress(StoreError):
                    writer.close()
                raise
            writer.close()
        finally:
            self.close()
            bar.close()

    def _fill(self, stream: Iterator[Batch], writer: Writer, manifest: Manifest, bar: Any) -> None:
        unit: Unit | None = None
        behind: tuple[Unit, Batch, Arriving] | None = None

        def arrive() -> None:
            nonlocal behind
            if behind is None:
                return
            into, batch, arriving = behind
            behind = None
            if not into.batches:
                into.digest = digest(batch.data)
            taken = arriving.wait()
            into.add(taken)
            bar.update(taken.samples)

        for batch, taken in self._passes(stream):
            number = batch.number // manifest.batches_per_unit
            arrive()
            if unit is not None and unit.number != number:
                self._put(unit, writer)
                unit = None
            check_same(taken, manifest.arrays, manifest.fields)
            _check_size(batch, taken, manifest)
            unit = unit or writer.unit(number, batch.start)
            behind = (unit, batch, Arriving(taken))
            last = (batch.number + 1) % manifest.batches_per_unit == 0
            # A unit ends before the next pass, so that its analyses have seen what is in it.
            if last or behind[2].here:
                arrive()
            if last:
                self._put(unit, writer)
                unit = None
        arrive()
        if unit is not None:
            self._put(unit, writer)

    def _passes(self, stream: Iterator[Batch]) -> Iterator[tuple[Batch, Taken]]:
        if self._pending is not None:
            yield self._pending
            self._pending = None
        yield from self.over(stream)

    def _put(self, unit: Unit, writer: Writer) -> None:
        beside, stale = self.riding.beside(unit.number)
        writer.put(unit, self.riding.run, self.riding.absorbed, beside, stale)


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
        return _NoBar()
    says = "progress=True needs tqdm: pip install fmapkit[data], or give progress=False"
    tqdm = needed("tqdm.auto", says).tqdm
    done, total = sum(record.samples for record in records.values()), manifest.samples
    if ranks > 1:
        done, total = 0, None if total is None else -(-(total - done) // ranks)
    what = "extract" if ranks == 1 else "extract, rank 0"
    return tqdm(total=total, initial=done, unit="samples", desc=what)


class _NoBar:
    def update(self, count: int) -> None:
        """Nothing to show."""

    def close(self) -> None:
        """Nothing to end."""


def default_call(model: nn.Module, kept: Mapping[str, Any]) -> Callable[[nn.Module, Any], Any]:
    """How a batch goes into the model, where nobody has said it.

    Args:
        model: whose `forward` says which entries of a dict it takes.
        kept: fields that are kept beside, which a `forward` with `**kwargs` is not given.
    """
    parameters = inspect.signature(model.forward).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    beside = {where for where in kept.values() if isinstance(where, str)}

    def call(model: nn.Module, data: Any) -> Any:
        if isinstance(data, Mapping):
            given = {
                key: value
                for key, value in data.items()
                if key in parameters or (anything and key not in beside)
            }
            if not given:
                raise ArgumentError(
                    f"forward of {type(model).__name__} takes none of the batch's entries "
                    f"{list(data)}; say how it is run with call=function(model, batch)"
                )
            return model(**given)
        if isinstance(data, (list, tuple)):
            return model(data[0])
        return model(data)

    return call
