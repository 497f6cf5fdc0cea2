"""Units on their way to the store: filled by the thread that runs the model, written by another.

Rows that a GPU made are copied beside the model's work, one batch behind it (`sent`).
At most three units are in memory: the one that is filled, one that waits, one that is written. So
memory is flat, and where the store is slower than the model, the model waits. While a unit is
written, a third thread waits for the disk to have the one before, and commits it then.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch

from fmapkit.data._manifest import Manifest, Spec, UnitRecord, as_stored
from fmapkit.data._place import Place
from fmapkit.data._riding import Riding
from fmapkit.data._rows import Taken
from fmapkit.errors import StoreError
from fmapkit.storage import Cuda

Blocks = dict[Spec, "np.ndarray[Any, Any]"]


def sent(taken: Taken) -> tuple[Taken, list[Any]]:
    """The rows of a batch in the host's memory, and the copies to wait for before they are there.

    What the model has made on a CPU is there already, and not copied.
    """
    copies: list[Any] = []
    arrays = []
    for spec, rows in taken.arrays:
        if rows.device.type == "cuda":
            host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
            # What the next pass may overwrite is copied there, in the model's own order.
            copies.append(_copies(rows.device).copy(rows.contiguous().clone(), host))
            rows = host
        arrays.append((spec, rows))
    return replace(taken, arrays=arrays), copies


_copies = cache(Cuda)  # by device


class Unit:
    """The rows of some batches in a row, while they come in."""

    def __init__(self, number: int, start: int, manifest: Manifest, spare: Blocks | None) -> None:
        self.number = number
        self.start = start  # number of its first sample
        self.samples = self.rows = self.batches = 0
        self.digest = ""
        self._manifest = manifest
        self._parts: dict[Spec, list[np.ndarray[Any, Any]]] = {}
        self.buffers: Blocks = {}
        if manifest.regular:
            # Spare ones are of a unit that has been written.
            self.buffers = spare or {
                spec: np.empty((manifest.rows_per_unit, *spec.shape), spec.stored)
                for spec in manifest.specs
            }

    def add(self, taken: Taken) -> None:
        """Copy the rows of a batch in: the model may overwrite them after it."""
        for array, rows in taken.arrays:
            self._put(array, as_stored(rows.detach().cpu()))
        for field, values in taken.fields:
            self._put(field, values)
        self.samples += taken.samples
        self.rows += taken.rows
        self.batches += 1

    def _put(self, spec: Spec, rows: np.ndarray[Any, Any]) -> None:
        if self._manifest.regular:
            self.buffers[spec][self.samples : self.samples + len(rows)] = rows
        else:
            self._parts.setdefault(spec, []).append(np.array(rows))

    def blocks(self) -> Blocks:
        """All rows, of each array and field."""
        if self._manifest.regular:
            return {spec: buffer[: self.samples] for spec, buffer in self.buffers.items()}
        return {spec: np.concatenate(parts) for spec, parts in self._parts.items()}


class _Stage:
    """A thread that does what it is given, in order; one more waits at most.

    After one has failed, nothing is done any more.
    """

    def __init__(self, name: str) -> None:
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(maxsize=1)
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, job: Callable[[], None] | None) -> None:
        """Have it done; waits while there is no room.

        Raises:
            BaseException: what went wrong with a job before.
        """
        while True:
            self.check()
            try:
                return self._jobs.put(job, timeout=0.5)
            except queue.Full:
                continue

    def close(self) -> None:
        """Wait for all that was put.

        Raises:
            BaseException: what went wrong.
        """
        self.put(None)
        self._thread.join()
        self.check()

    def check(self) -> None:
        """Raise what went wrong, if anything did."""
        if self._failed is not None:
            raise self._failed

    def _run(self) -> None:
        try:
            while (job := self._jobs.get()) is not None:
                job()
        except BaseException as error:
            self._failed = error


class Writer:
    """The threads that write units, and commit them, in order."""

    def __init__(self, place: Place, manifest: Manifest, riding: Riding) -> None:
        self._place = place
        self._manifest = manifest
        self._riding = riding
        self._spare: queue.SimpleQueue[Blocks] = queue.SimpleQueue()
        self._committing = _Stage("fmapkit-committer")
        self._writing = _Stage("fmapkit-writer")

    def unit(self, number: int, start: int) -> Unit:
        """An empty unit, in buffers that are used again."""
        spare = None if self._spare.empty() else self._spare.get()
        return Unit(number, start, self._manifest, spare)

    def put(self, unit: Unit) -> None:
        """Have a unit written, and committed; waits while another one does.

        What the analyses know by now is written before the commit.

        Raises:
            StoreError: a unit before could not be written.
        """
        beside, stale = self._riding.beside(unit.number)
        record = UnitRecord(
            unit.number,
            unit.start,
            unit.samples,
            unit.rows,
            unit.batches,
            unit.digest,
            self._riding.run,
            self._riding.absorbed,
        )
        with self._told():
            self._committing.check()
            self._writing.put(partial(self._write, unit, record, beside, stale))

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for all that was put, be it that something went wrong elsewhere: that counts.

        Raises:
            StoreError: something could not be written.
        """
        with suppress(StoreError) if kind else nullcontext(), self._told(), ExitStack() as stack:
            stack.callback(self._committing.close)
            stack.callback(self._writing.close)  # before that

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            raise StoreError(
                f"could not write to {self._place}: {error}; what was committed before is kept, "
                "and the same call goes on from there"
            ) from error

    def _write(
        self,
        unit: Unit,
        record: UnitRecord,
        beside: Mapping[str, bytes],
        stale: tuple[str, ...],
    ) -> None:
        written = self._place.write(self._manifest, unit.number, unit.blocks())
        if unit.buffers:
            self._spare.put(unit.buffers)
        for path, content in beside.items():
            written += self._place.write_bytes(path, content)
        self._committing.put(partial(self._commit, record, written, stale))

    def _commit(self, record: UnitRecord, written: list[str], stale: tuple[str, ...]) -> None:
        self._place.flush(*written)
        committed = self._place.commit(record)
        if stale:
            self._place.flush(committed)
        for path in stale:
            self._place.remove(path)
