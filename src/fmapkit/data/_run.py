"""The loop: batches through the model, rows into units, units to the writer."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import chain
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
        self._begun: Iterator[tuple[Batch, Taken]] | None = None
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
        stream = self.over(batches.read(lambda number: True))
        first = next(stream, None)
        if first is None:
            raise ArgumentError("the loader is empty: there is no batch to take features of")
        try:
            manifest = create(*first)
        except BaseException:
            self.close()
            raise
        self._begun = chain([first], stream)
        return manifest

    # -- units ------------------------------------------------------------------------------------

    def units(
        self,
        batches: Batches,
        place: Place,
        manifest: Manifest,
        share: Share,
        records: Mapping[int, UnitRecord],
        check: bool,
        progress: int,
    ) -> None:
        """Run all batches of this rank, and have their rows written.

        Args:
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
        passes = self._begun or self.over(batches.read(share, skipped))
        try:
            writer = Writer(place, manifest)
            try:
                self._fill(passes, writer, manifest, bar)
            except BaseException:
                # Whole units are still written; what went wrong is what counts.
                with suppress(StoreError):
                    writer.close()
                raise
            writer.close()
        finally:
            self.close()
            if bar is not None:
                bar.close()

    def _fill(
        self, passes: Iterator[tuple[Batch, Taken]], writer: Writer, manifest: Manifest, bar: Any
    ) -> None:
        unit: Unit | None = None
        for batch, taken in _on_host(passes, manifest):
            if unit is None:
                unit = writer.unit(batch.number // manifest.batches_per_unit, batch.start)
                unit.digest = digest(batch.data)
            unit.add(taken)
            if bar is not None:
                bar.update(taken.samples)
            if manifest.ends_unit(batch.number):
                self._put(unit, writer)
                unit = None
        if unit is not None:
            self._put(unit, writer)

    def _put(self, unit: Unit, writer: Writer) -> None:
        beside, stale = self.riding.beside(unit.number)
        writer.put(unit, self.riding.run, self.riding.absorbed, beside, stale)


def _on_host(
    passes: Iterator[tuple[Batch, Taken]], manifest: Manifest
) -> Iterator[tuple[Batch, Taken]]:
    """The same in the host's memory, where a batch arrives while the next one runs.

    The last one of a unit is waited for, so that its analyses have seen what is in it, and no more.
    """
    behind: tuple[Batch, Arriving] | None = None
    for batch, taken in passes:
        if behind is not None:
            yield behind[0], behind[1].wait()
        check_same(taken, manifest.arrays, manifest.fields)
        _check_size(batch, taken, manifest)
        behind = batch, Arriving(taken)
        if behind[1].here or manifest.ends_unit(batch.number):
            yield batch, behind[1].wait()
            behind = None
    if behind is not None:
        yield behind[0], behind[1].wait()


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
        return None
    says = "progress=True needs tqdm: pip install fmapkit[data], or give progress=False"
    tqdm = needed("tqdm.auto", says).tqdm
    done, total = sum(record.samples for record in records.values()), manifest.samples
    if ranks > 1:
        done, total = 0, None if total is None else -(-(total - done) // ranks)
    what = "extract" if ranks == 1 else "extract, rank 0"
    return tqdm(total=total, initial=done, unit="samples", desc=what)


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
