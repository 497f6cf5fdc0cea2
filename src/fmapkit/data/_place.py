"""A store of features in Zarr: made, written unit by unit, committed, finished, listed.

What is written when, and why nothing is lost by it, is told in `docs/data-format.md`. In short: the
arrays of a unit are written first, its record (`commits/<unit>`) last, and each of these is one
object that is there as a whole or not at all. A unit without a record is as if it was not there.
In a folder, the disk has what comes first before the next is given to it.
"""

from __future__ import annotations

import json
import platform
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from fmapkit.data import _objects
from fmapkit.data._manifest import FORMAT, FieldSpec, Manifest, Spec, UnitRecord, from_json
from fmapkit.data._pieces import chunk_name
from fmapkit.errors import ArgumentError, StoreError, StoreMismatchError

if TYPE_CHECKING:
    from zarr import Array, Group

_CHUNK = 2**20  # bytes of a chunk of a shard, about
_KEY = "fmapkit"
_ZARR_TAKES = (3, 11)  # of Python's versions; see the extra `data` in pyproject.toml


def zarr_module() -> Any:
    """Zarr, unless it is not installed or too old, or this Python is."""
    try:
        import zarr
    except ImportError as error:
        if sys.version_info < _ZARR_TAKES:
            raise ImportError(
                "features on disk need zarr 3.1.4, which takes Python 3.11 or newer, and this is "
                f"Python {platform.python_version()}"
            ) from error
        raise ImportError("features on disk need zarr: pip install fmapkit[data]") from error
    if int(zarr.__version__.split(".")[0]) < 3:
        raise ImportError(
            f"features on disk need zarr 3, and this is {zarr.__version__}: "
            "pip install --upgrade fmapkit[data]"
        )
    return zarr


def node_of(unit: int) -> str:
    """The name of what belongs to a unit."""
    return f"{unit:010d}"


class Place:
    """Where a store is (at a path, a URL, in a Zarr store), and all that is done to it."""

    def __init__(
        self,
        to: Any,
        storage_options: Mapping[str, Any] | None = None,
        compressors: Any = None,
    ) -> None:
        zarr = zarr_module()
        self._zarr = zarr
        self._compressors = compressors  # of the arrays that are made here; None for none
        self._opened: dict[str, Array[Any]] = {}  # to be written to
        self.local: Path | None = None  # the folder, where it is one of this machine
        if isinstance(to, Path) or (isinstance(to, str) and "://" not in to):
            if storage_options:
                raise ArgumentError("storage_options= go with a URL such as s3://bucket/name")
            self.local = Path(to).absolute()
            self._store: Any = zarr.storage.LocalStore(self.local)
        elif isinstance(to, str):
            options = dict(storage_options or {})
            self._store = zarr.storage.FsspecStore.from_url(to, storage_options=options)
        elif isinstance(to, zarr.abc.store.Store):
            self._store = to
            if isinstance(to, zarr.storage.LocalStore):
                self.local = Path(to.root)
        else:
            raise ArgumentError(f"to= must be a path, a URL or a Zarr store, not {to!r}")
        self._said = str(to)

    def __repr__(self) -> str:
        return self._said

    # -- what is there ----------------------------------------------------------------------------

    def _root(self) -> Group | None:
        try:
            return self._zarr.open_group(self._store, mode="r", zarr_format=3)  # type: ignore[no-any-return]
        except FileNotFoundError:  # Zarr's own, of a group that is not there, is one
            return None

    def manifest(self) -> Manifest | None:
        """What is said of the features here; None where there are none. Refuses anything else."""
        try:
            root = self._root()
        except Exception as error:
            raise StoreMismatchError(f"{self} is no store of features: {error}") from error
        if root is None:
            self._refuse_others()
            return None
        said = root.attrs.asdict().get(_KEY)
        if not isinstance(said, Mapping):
            raise StoreMismatchError(
                f"{self} is a Zarr group that fmapkit did not make; give another place"
            )
        if said.get("format") != FORMAT:
            raise StoreMismatchError(
                f"{self} is in format {said.get('format')} of fmapkit, which reads {FORMAT}"
            )
        if "arrays" not in said:  # begun, and interrupted before all of it was there
            return None
        return Manifest.of(said)

    def _refuse_others(self) -> None:
        """A folder that holds something else is left alone."""
        if self.local is None or not self.local.exists():
            return
        if not self.local.is_dir():
            raise StoreMismatchError(f"{self} is a file; give a folder that is not there yet")
        for entry in self.local.iterdir():
            # An interrupted write of the root leaves this, and nothing else.
            if not (entry.name.startswith("zarr.") and entry.name.endswith(".partial")):
                raise StoreMismatchError(
                    f"{self} holds something else already ({entry.name!r}); give a folder that is "
                    "empty, or not there yet"
                )

    def records(self) -> dict[int, UnitRecord]:
        """The units that are here, by number."""
        root = self._root()
        assert root is not None
        if root.attrs[_KEY].get("complete"):  # type: ignore[union-attr]
            return dict(self._index(root))
        found = []
        for content in _objects.read(self._store, "commits"):
            with suppress(ValueError):  # after a power cut it may be empty, or zeros
                found.append(from_json(UnitRecord, json.loads(content)))
        return {record.unit: record for record in sorted(found, key=lambda r: r.unit)}

    @staticmethod
    def _index(root: Group) -> Iterator[tuple[int, UnitRecord]]:
        table = root["index"][:]  # type: ignore[index]
        runs: Any = root["index"].attrs["runs"]
        for unit, start, samples, rows, batches, run in np.asarray(table).tolist():
            name, absorbed = runs[run]
            yield unit, UnitRecord(unit, start, samples, rows, batches, "", name, tuple(absorbed))

    def array(self, path: str) -> Array[Any]:
        """An array of the store, to read or to write."""
        # A chunk of zeros is written too: without it, a shard could not be read by its place.
        with self._zarr.config.set({"array.write_empty_chunks": True}):
            return self._zarr.open_array(self._store, path=path, zarr_format=3)  # type: ignore[no-any-return]

    # -- making -----------------------------------------------------------------------------------

    def create(self, manifest: Manifest) -> None:
        """Make an empty store; what says so is written last, so that it is whole by then."""
        zarr = self._zarr
        with self._complained("begin"):
            if self._root() is None:  # in one write, so that it is ours from the first object on
                begun = {_KEY: {"format": FORMAT}}
                zarr.create_group(self._store, attributes=begun, zarr_format=3)
            root = zarr.open_group(self._store, mode="r+", zarr_format=3)
            for spec in manifest.specs:
                if manifest.regular:
                    assert manifest.samples is not None
                    self._make(spec, spec.node, manifest.samples, manifest.rows_per_unit)
                else:
                    zarr.create_group(
                        self._store, path=spec.node, attributes=asdict(spec), overwrite=True
                    )
            zarr.create_group(self._store, path="commits", overwrite=True)
            self.flush("")
            root.attrs.put({_KEY: manifest.to_json()})
            self.flush("zarr.json")

    def _make(self, spec: Spec, path: str, total: int, shard: int) -> Array[Any]:
        shape = tuple(max(1, n) for n in spec.shape)
        text = isinstance(spec, FieldSpec) and spec.text
        # In a folder, uncompressed, a unit is a file of rows as they lie in memory: any of them can
        # be read by its place, and Zarr writes it as fast as the disk takes it. Elsewhere it is a
        # shard of chunks, since what is read of an object, or unpacked, is a chunk.
        plain = self._plain and not text
        rows = shard if plain else _chunk_rows(shard, spec.row_bytes)
        return self._zarr.create_array(  # type: ignore[no-any-return]
            self._store,
            name=path,
            shape=(total, *spec.shape),
            chunks=(rows, *shape),
            shards=None if plain else (shard, *shape),
            chunk_key_encoding={"name": "default", "separator": "."},  # no folders for each
            dtype=str if text else spec.stored,
            compressors=self._compressors,
            fill_value="" if text else 0,
            dimension_names=spec.dimensions,
            attributes=asdict(spec),
            overwrite=True,
            config={"write_empty_chunks": True},
        )

    # -- writing ----------------------------------------------------------------------------------

    @property
    def _plain(self) -> bool:
        """Whether files hold rows as they lie in memory."""
        return self.local is not None and self._compressors is None

    def write(
        self, manifest: Manifest, unit: int, blocks: Mapping[Spec, np.ndarray[Any, Any]]
    ) -> list[str]:
        """Write all rows of a unit; returns what has to be flushed."""
        written = []
        for spec, block in blocks.items():
            path = spec.node
            if not manifest.regular and len(block):  # Zarr has no chunk of no rows
                whole = len(block) if self._plain else _rounded(len(block), spec.row_bytes)
                written.append(f"{path}/{node_of(unit)}")
                self._make(spec, written[-1], len(block), whole)[:] = block
            elif manifest.regular and block.size:
                if path not in self._opened:
                    self._opened[path] = self.array(path)
                start = unit * manifest.rows_per_unit
                self._opened[path][start : start + len(block)] = block
                written.append(f"{path}/{chunk_name(unit, block.ndim - 1)}")
        return written

    def write_bytes(self, path: str, content: bytes) -> list[str]:
        """Write one object of bytes; returns what has to be flushed."""
        self._zarr.create_array(
            self._store,
            name=path,
            data=np.frombuffer(content, np.uint8),
            chunks=(max(1, len(content)),),
            compressors=None,
            overwrite=True,
            config={"write_empty_chunks": True},
        )
        return [path, *(f"{group}/zarr.json" for group in PurePosixPath(path).parents[:-1])]

    def read_bytes(self, path: str) -> bytes:
        return bytes(np.asarray(self.array(path)[:]))

    def remove(self, path: str) -> None:
        """Remove a node and all below it, if it is there."""
        root = self._zarr.open_group(self._store, mode="a", zarr_format=3)
        if path in root:
            del root[path]

    def children(self, path: str) -> list[str]:
        """The names of the nodes below a group; none where it is not there."""
        root = self._root()
        if root is None or path not in root:
            return []
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Object at .* is not recognized")
            return sorted(name for name, _ in root[path].members())  # type: ignore[union-attr]

    def flush(self, *paths: str) -> None:
        """Wait until the disk has what is at some paths."""
        # Where the store is no folder, what was taken is kept.
        if self.local is not None:
            _objects.flush(self.local / path for path in paths)

    def commit(self, record: UnitRecord) -> str:
        """Say that a unit is there: one object, written at once, after `flush`; returns its path.

        The disk need not have it: where a power cut takes it away, the unit is done again.
        """
        path = f"commits/{node_of(record.unit)}"
        content = json.dumps(asdict(record)).encode()
        _objects.put(self._store, path, content)
        return path

    def finish(self, manifest: Manifest, records: Iterable[UnitRecord]) -> None:
        """Put all records into one array, say that the data set is complete, and let them go."""
        known = sorted(records, key=lambda record: record.unit)
        runs = {record.run: record.absorbed for record in known}
        at = {run: number for number, run in enumerate(runs)}
        rows = [(r.unit, r.start, r.samples, r.rows, r.batches, at[r.run]) for r in known]
        with self._complained("finish"):
            self._zarr.create_array(
                self._store,
                name="index",
                data=np.asarray(rows, np.int64).reshape(-1, 6),
                chunks=(max(1, len(rows)), 6),
                compressors=None,
                dimension_names=("units", "columns"),
                attributes={
                    "columns": ["unit", "start", "samples", "rows", "batches", "run"],
                    "runs": [[run, list(absorbed)] for run, absorbed in runs.items()],
                },
                overwrite=True,
            )
            root = self._zarr.open_group(self._store, mode="a", zarr_format=3)
            self.flush("index")
            root.attrs.put({_KEY: replace(manifest, complete=True).to_json()})
            self.flush("zarr.json")
            self.tidy()

    def tidy(self) -> None:
        """Remove what a complete store has no use for, and what killed writers left half done."""
        root = self._zarr.open_group(self._store, mode="a", zarr_format=3)
        if "commits" not in root:
            return
        if self.local is not None:
            for left in self.local.rglob("*.partial"):
                left.unlink(missing_ok=True)
        del root["commits"]

    @contextmanager
    def _complained(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(f"could not {what} {self}: {error}") from error


def _chunk_rows(shard: int, row_bytes: int) -> int:
    """Rows of a chunk: the most that go into `_CHUNK` and divide a shard."""
    most = min(shard, max(1, _CHUNK // max(1, row_bytes)))
    return next(rows for rows in range(most, 0, -1) if shard % rows == 0)


def _rounded(rows: int, row_bytes: int) -> int:
    """Rows of a shard that holds that many, in chunks of about `_CHUNK` bytes."""
    chunk = min(rows, max(1, _CHUNK // max(1, row_bytes)))
    return -(-rows // chunk) * chunk
