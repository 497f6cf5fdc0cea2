"""`Features`: what `extract` has written, read as arrays."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fmapkit.data._arrays import FeatureArray, StoredArray, save_safetensors
from fmapkit.data._manifest import Manifest, Spec
from fmapkit.data._pieces import Piece, Pieces, chunk_name
from fmapkit.data._place import Place, node_of
from fmapkit.errors import (
    AmbiguousMapError,
    ArgumentError,
    KindNotCapturedError,
    StoreError,
    UnknownLayerError,
    did_you_mean,
    listed,
    near,
)
from fmapkit.tables import Shown, Table

if TYPE_CHECKING:
    from fmapkit.data.loader import RowLoader


class Features(Shown):
    """Features of a data set, as `extract` has written them; they are read when asked for.

    ```python
    features = Features("features.zarr")
    features["layer3"]                  # an array that slices: torch tensors
    features["layer3", "preactivation"]
    features.fields["label"]
    ```

    A store that is still being written, or was interrupted, can be read too: what is committed is
    there, in the order of samples, and `features.samples` says which ones. To see what has come
    since, make a new object.

    Args:
        where: a folder, a URL that fsspec knows, or a Zarr store.
        storage_options: for fsspec.

    Raises:
        StoreError: there are no features.
    """

    def __init__(self, where: Any, *, storage_options: Mapping[str, Any] | None = None) -> None:
        self._place = Place(where, storage_options)
        manifest = self._place.manifest()
        if manifest is None:
            raise StoreError(f"there are no features at {self._place}: extract(...) writes them")
        self._manifest: Manifest = manifest
        self._records = self._place.records()
        self._arrays = {spec: FeatureArray(spec, self._pieces(spec)) for spec in manifest.arrays}
        self.fields: Mapping[str, StoredArray] = {
            spec.name: StoredArray(spec.name, self._pieces(spec), spec.shape, spec.dtype)
            for spec in manifest.fields
        }

    # -- what there is ----------------------------------------------------------------------------

    @property
    def complete(self) -> bool:
        """Whether the whole data set is there."""
        return self._manifest.complete

    @property
    def layers(self) -> list[str]:
        """The layers, in execution order."""
        return list(dict.fromkeys(spec.layer for spec in self._manifest.arrays))

    @property
    def samples(self) -> Tensor:
        """The number in the data set of each sample that is there, in order: (samples,), int64."""
        parts = [torch.arange(r.start, r.start + r.samples) for r in self._records.values()]
        return torch.cat(parts) if parts else torch.arange(0)

    def __len__(self) -> int:
        """How many samples are there."""
        return sum(record.samples for record in self._records.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, before compression."""
        return sum(array.nbytes for array in self._arrays.values())

    @property
    def about(self) -> Mapping[str, Any]:
        """The call that made the features, and the versions of what made them."""
        return {"asked": dict(self._manifest.asked), "versions": dict(self._manifest.versions)}

    def __iter__(self) -> Iterator[FeatureArray]:
        """Every array, in execution order."""
        return iter(self._arrays.values())

    def __contains__(self, layer: object) -> bool:
        return any(spec.layer == layer for spec in self._arrays)

    def __getitem__(self, key: str | tuple[str, str]) -> FeatureArray:
        """The array of a layer, or of (layer, kind).

        A layer that has several arrays stands for its activation.

        Raises:
            UnknownLayerError: no such layer is here.
            KindNotCapturedError: that kind is not.
            AmbiguousMapError: several arrays answer; `select` chooses.
        """
        layer, kind = (key, None) if isinstance(key, str) else key
        if layer not in self:
            hint = did_you_mean(layer, self.layers)
            raise UnknownLayerError(
                f"no features of layer {layer!r} here{hint}; there are {listed(self.layers)}",
                layer=layer if isinstance(layer, str) else None,
                candidates=near(layer, self.layers) or self.layers,
            )
        found = self.select(layer=layer, kind=kind)
        if kind is None and len(found) > 1:
            found = [a for a in found if a.kind == "activation"] or found
        if not found:
            kinds = sorted({a.kind for a in self.select(layer=layer)})
            raise KindNotCapturedError(
                f"no {kind} of layer {layer!r} here; there is {listed(kinds)}",
                layer=layer,
                kind=kind,
                candidates=kinds,
            )
        if len(found) > 1:
            said = ", ".join(f"(kind={a.kind!r}, call={a.call}, path={a.path!r})" for a in found)
            raise AmbiguousMapError(
                f"features[{key!r}] could mean {len(found)} arrays: {said}; choose with "
                f"features.select(layer={layer!r}, call=…)",
                layer=layer,
                kind=kind,
                candidates=[{"kind": a.kind, "call": a.call, "path": a.path} for a in found],
            )
        return found[0]

    def select(
        self,
        layer: str | None = None,
        kind: str | None = None,
        call: int | None = None,
        path: str | None = None,
    ) -> list[FeatureArray]:
        """Every array that fits, in execution order."""
        return [
            array
            for array in self
            if layer in (None, array.layer)
            and kind in (None, array.kind)
            and call in (None, array.call)
            and path in (None, array.path)
        ]

    def _table(self) -> Table:
        head = ("layer", "kind", "rows", "shape", "dtype", "MB", "σ")
        rows = [
            (
                array.layer or "(model)",
                array.kind + array.path,
                "tokens" if array.per == "token" else "samples",
                "×".join(map(str, array.shape)),
                str(array.dtype).removeprefix("torch."),
                f"{array.nbytes / 1e6:,.1f}",
                array.nonlinearity or "",
            )
            for array in self
        ]
        beside = f", beside {listed(self.fields)}" if self.fields else ""
        total = f" of {self._manifest.samples}" if self._manifest.samples is not None else ""
        state = "" if self.complete else f"{total}, incomplete"
        last = f"Features: {len(self)} samples{state}{beside}"
        return Table(head, rows, (), last)

    # -- out --------------------------------------------------------------------------------------

    def to_npy(self, folder: str | Path) -> list[Path]:
        """Write each array to a `.npy` file; returns their paths.

        Memory stays flat. Types that NumPy lacks (bfloat16) become float32.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for spec, array in self._arrays.items():
            paths.append(array.to_npy(folder / f"{spec.name.replace('/', '-')}.npy"))
        for name, field in self.fields.items():
            paths.append(field.to_npy(folder / f"{name}.npy"))
        return paths

    def to_safetensors(self, path: str | Path) -> Path:
        """Write all arrays to one safetensors file (extra: `safetensors`), with their tags.

        They are read into memory for it. Fields of text are left out.
        """
        tensors = {array.name: array.tensor() for array in self}
        tags = {array.name: json.dumps(array.tags) for array in self}
        tensors |= {
            f"fields/{name}": field.tensor()
            for name, field in self.fields.items()
            if field.dtype is not None
        }
        return save_safetensors(path, tensors, tags)

    def loader(
        self,
        layers: str | tuple[str, str] | list[str | tuple[str, str]],
        batch: int,
        *,
        shuffle: str | None = "buffer",
        buffer: int = 2**16,
        fields: str | list[str] | tuple[str, ...] = (),
        seed: int = 0,
        rank: int | None = None,
        world: int | None = None,
        drop_last: bool = False,
    ) -> RowLoader:
        """Batches of rows, shuffled: to train a probe or a sparse autoencoder.

        Args:
            layers: keys as in `features[...]`: one gives tensors, a list a dict of tensors.
            batch: rows of each batch.
            shuffle: "buffer" draws from a buffer of rows which is refilled from units in random
                order, as its half is used up; None keeps the order of samples.
            buffer: rows of that buffer, which are in memory.
            fields: of what was kept beside, given in the dict under their names.
            seed: of the order: the same seed gives the same batches.
            rank: the part of this rank; None for torch.distributed's.
            world: of how many ranks; None for torch.distributed's.
            drop_last: leave out a last batch that is not full.

        Returns:
            A `RowLoader`: iterated anew it goes on to the next epoch, in another order.

        Raises:
            MapLookupError: no such layer.
            ArgumentError: a field or number cannot be meant.
        """
        from fmapkit.data.loader import RowLoader, StoredRows

        keys = layers if isinstance(layers, list) else [layers]
        names = [fields] if isinstance(fields, str) else list(fields)
        arrays: dict[str, StoredArray] = {
            key if isinstance(key, str) else "/".join(key): self[key] for key in keys
        }
        for name in names:
            if name not in self.fields:
                raise ArgumentError(
                    f"fields={name!r}: nothing of that name was kept; there is "
                    f"{listed(self.fields)}",
                    candidates=self.fields,
                )
            if name in arrays:
                raise ArgumentError(f"{name!r} is a layer and a field; ask for them apart")
            arrays[name] = self.fields[name]
        rows = {name: len(array) for name, array in arrays.items()}
        if len(set(rows.values())) > 1:
            raise ArgumentError(
                f"these have rows of tokens and of samples, which do not go together: {rows}"
            )
        return RowLoader(
            StoredRows(arrays),
            batch,
            shuffle=shuffle,
            buffer=buffer,
            seed=seed,
            rank=rank,
            world=world,
            drop_last=drop_last,
            single=not isinstance(layers, list) and not names,
        )

    # -- pieces -----------------------------------------------------------------------------------

    def _pieces(self, spec: Spec) -> Pieces:
        path, where, axes, pieces = spec.node, self._place.local, len(spec.shape), []
        array = cache(partial(self._place.array, path))
        for record in self._records.values():
            at, shard, rows = path, record.unit, record.samples
            size = self._manifest.rows_per_unit if self._manifest.regular else 0
            if not self._manifest.regular:  # an array for itself
                at, shard = f"{path}/{node_of(record.unit)}", 0
                array = cache(partial(self._place.array, at))
                size = rows = record.rows if spec.per == "token" else rows
            file = (where / at / chunk_name(shard, axes), size) if where else None
            pieces.append(Piece(array, shard * size, rows, file))
        return Pieces(pieces, spec.shape, spec.stored)
