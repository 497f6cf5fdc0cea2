"""What the user reads: `FeatureMaps`, all maps of a capture; `FeatureMap` is one of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fmapkit._lazy import LazyMethod
from fmapkit.errors import ArgumentError, CaptureStateError
from fmapkit.kinds import Kind
from fmapkit.lookup import (
    choose,
    every,
    find,
    gather,
    latest,
    maps_table,
    parse,
    pass_number,
    read,
)
from fmapkit.map import FeatureMap, checked_mask, nbytes_of, unpadded
from fmapkit.saving import KeptSession, Snapshot, load, save, snapshot_of
from fmapkit.storage import MapRecord, Pass

if TYPE_CHECKING:
    import os

    from fmapkit import page
    from fmapkit import plot as drawing
    from fmapkit.checking import NonFinite
    from fmapkit.missed import Missed
    from fmapkit.session import EndedBlock, Session

__all__ = ["FeatureMap", "FeatureMaps"]

Key = str | tuple[str, Kind] | tuple[str, Kind, int]


class FeatureMaps:
    """The maps of a capture; readable during the block and after it.

    A look-up (`maps[layer]`, `maps[layer, kind]`, `maps[layer, kind, filter]`) and iteration read
    the latest pass; `select` reads every pass that is kept. With `keep=0` none is: all that was
    captured went to the analyses.

    A copy (`copy`, `pickle`, `torch.save`) and what `save` writes have the values and tags of every
    pass that is kept, and nothing of the model.
    """

    def __init__(self, session: Session | EndedBlock | KeptSession) -> None:
        self._session = session

    def _end(self, block: EndedBlock) -> None:
        """The block has ended, and the session may be another one's."""
        self._session = block

    # -- the latest pass ----------------------------------------------------------------------

    def __iter__(self) -> Iterator[FeatureMap]:
        """Every map of the latest pass, in execution order."""
        for at, entry in latest(self._session):
            yield read(self._session, at, entry)

    def __len__(self) -> int:
        """How many maps the latest pass holds."""
        return len(latest(self._session))

    @property
    def layers(self) -> list[str]:
        """The layers that have maps in the latest pass, in execution order."""
        return list(dict.fromkeys(e.origin.name for _, e in latest(self._session)))

    def __contains__(self, key: object) -> bool:
        """Whether the latest pass has a map of a layer, or of a (layer, kind)."""
        layer, *kind = key if isinstance(key, tuple) and len(key) == 2 else (key,)
        name = self._session.names.canonical(layer) if isinstance(layer, str) else layer
        there = (e for _, e in latest(self._session) if e.origin.name == name)
        return any(not kind or e.kind == kind[0] for e in there)

    def keys(self) -> list[tuple[str, Kind]]:
        """What can be looked up in the latest pass: each (layer, kind) once, in execution order.

        One that means several maps, of a layer that was called twice, is an error to look up.
        """
        return list(dict.fromkeys(key for key, _ in self.items()))

    def items(self) -> list[tuple[tuple[str, Kind], FeatureMap]]:
        """Every map of the latest pass with its (layer, kind), in execution order.

        Raises:
            MapStateError: a map cannot be read any more.
        """
        return [((fm.layer, fm.kind), fm) for fm in self]

    def _ipython_key_completions_(self) -> list[Any]:
        """What IPython and Jupyter offer after `maps[`."""
        kinds = dict.fromkeys((e.origin.name, e.kind) for _, e in latest(self._session))
        return [*self.layers, *kinds]

    def __getitem__(self, key: Key) -> FeatureMap:
        """One map of the latest pass.

        Args:
            key: a layer (its activation; of a module that is no filter layer, its output), or
                (layer, kind), or (layer, kind, filter).

        Raises:
            NoPassError: nothing has been captured yet.
            MapReleasedError: `keep=0` has let go of it.
            MapOverwrittenError: its memory was written to since.
            UnknownLayerError: no map of such a layer.
            NoActivationError: no nonlinearity follows it.
            KindNotCapturedError: it has no map of that kind.
            AmbiguousMapError: several maps answer.
            FilterRangeError: it has no such filter.
        """
        layer, kind, index = parse(key)
        result = read(self._session, *find(self._session, layer, kind, latest(self._session)))
        return result if index is None else result[index]

    # -- every pass that is kept --------------------------------------------------------------

    def select(
        self,
        layers: Any = None,
        kind: Kind | None = None,
        filter: int | None = None,
        call: int | None = None,
        step: int | None = None,
        *,
        nonlinearity: str | None = None,
        path: str | None = None,
        training: bool | None = None,
        layer: Any = None,
    ) -> list[FeatureMap]:
        """Every map that fits, over all passes that are kept, in execution order.

        Args:
            layers: a name, glob, regex, module, module type or callable, or several of these.
            kind: one of the five kinds.
            filter: only this filter of each map (a view); maps without it are left out.
            call: only this call of each layer.
            step: only this pass; -1 is the latest.
            nonlinearity: only maps of this σ.
            path: only this place in a nested output.
            training: only passes that began in training mode (True) or in eval mode (False).
            layer: the same as `layers`.

        Raises:
            ArgumentError: an argument is of no allowed form.
            UnknownLayerError: a name or a pattern in `layers` means no layer that has maps.
        """
        if layer is not None and layers is not None:
            raise ArgumentError("layer= and layers= are the same: give one of them")
        layers = layers if layer is None else layer
        wanted = (kind, filter, call, step, nonlinearity, path, training)
        return list(choose(self._session, layers, *wanted))

    def gather(
        self,
        layer: str,
        kind: Kind | None = None,
        filter: int | None = None,
        *,
        call: int | None = None,
        step: int | None = None,
        dim: int = 0,
        dst: int | None = None,
        group: Any = None,
    ) -> FeatureMap | None:
        """One map of all ranks: their batches, one after the other in the order of ranks.

        A collective: every rank of the group has to call it, with the same arguments. Batches may
        be of different sizes. Should one rank have no such map, all raise. The result is a copy
        outside the autograd graph, on the device of this rank's map; the maps that are held stay
        as they are.

        Args:
            layer: its name, as in `maps[layer, kind, filter]`.
            kind: one of the five kinds; by default as in `maps[layer]`.
            filter: one filter only.
            call: which call of the layer, where it has several.
            step: which pass; by default the latest, and the ranks have to be at the same one.
            dim: the batch axis.
            dst: the rank that gets the result, by its global number; None for all.
            group: the process group; None for the default one.

        Returns:
            The map; on ranks other than `dst`, None.

        Raises:
            DistributedError: torch.distributed is not initialised, the ranks do not agree, or
                another rank has no such map.
            MapLookupError: this rank has no such map, or several.
            ArgumentError: `dim` or `dst` cannot be meant.
        """

        def mine() -> FeatureMap:
            name, wanted, _ = parse((layer,) if kind is None else (layer, kind))
            at = pass_number(self._session, step)
            entries = latest(self._session)
            if at is not None:
                entries = [p for p in every(self._session) if p[0].step == at]
            if call is not None:
                entries = [p for p in entries if p[1].origin.call == call]
            found = read(self._session, *find(self._session, name, wanted, entries))
            return found if filter is None else found[filter]

        asked = ", ".join(repr(v) for v in (layer, kind, filter) if v is not None)
        return gather(mine, dim, dst, group, asked)

    def _shown(self, at: Pass, entry: MapRecord) -> FeatureMap:
        """As an analysis sees it."""
        fm = read(self._session, at, entry, made=True)
        return fm if at.mask is None else unpadded(fm, at.mask)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the maps of all kept passes hold; shared memory counts once."""
        return self._session.store.nbytes

    @property
    def bytes_copied(self) -> int:
        """Bytes of the latest pass's maps that are copies, not the model's own memory.

        Copied because the model overwrote the map, or for `filters=`, `dtype=` or `device=`.
        """
        copied = {
            id(e.held.tensor): nbytes_of(e.held.tensor)
            for _, e in latest(self._session)
            if e.held is not None and e.held.copied and e.held.tensor is not None
        }
        return sum(copied.values())

    @property
    def missed(self) -> list[Missed]:
        """What ran and could not be captured, each with the module's name and the reason."""
        return list(self._session.missed)

    def clear(self) -> None:
        """Let every map go; maps read before stay readable."""
        self._session.store.clear()
        self._session.wants.conversion.buffers.drop()

    def batch(
        self, ids: Tensor | Iterable[int] | None = None, *, mask: Tensor | None = None
    ) -> None:
        """Tell of the inputs of the next pass: their numbers, and which positions are padding.

        Its maps have the numbers as `fm.ids`, and analyses that keep inputs apart go by them. With
        a mask, analyses are shown what is no padding: of a map (samples, positions, ..., filters),
        or (samples, filters, positions) as Conv1d has it, the positions that are kept, one after
        the other, each under its sample's number. Maps of other shapes are shown whole, and held
        maps stay whole.

        Args:
            ids: their places in the data set, say: one whole number for each entry of the first
                axis. Where no input of the pass has an axis of so many, its maps have no ids, and
                `missed` says so.
            mask: (samples, positions), booleans or 0 and 1, as tokenizers give it: 0 is padding.

        Raises:
            ArgumentError: the numbers are no whole numbers in a row, or the mask is none.
            CaptureStateError: the maps were loaded, or copied: no pass will come.
        """
        if isinstance(self._session, KeptSession):
            raise CaptureStateError("batch() numbers the next pass; no pass of these will come")
        if mask is not None:
            mask = checked_mask(mask, "batch takes a mask")
        self._session.tell(None if ids is None else _numbers(ids), mask)

    def first_nonfinite(self) -> NonFinite | None:
        """The first map held that has a NaN or an infinite value, over all passes that are kept.

        In execution order; it says which filter, and the largest finite value before it. None if
        every value is finite. Waits for the device, once. What is not held is not looked at:
        `capture(model, check="finite")` looks at every map of a pass, and at the gradients.

        Raises:
            MapStateError: a map cannot be read any more.
        """
        from fmapkit.checking import first_nonfinite

        return first_nonfinite(read(self._session, *found) for found in every(self._session))

    # -- to keep ------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write every map that is kept to a safetensors file (extra: `safetensors`).

        Values and tags, gradients that have arrived included; no pickle. `FeatureMaps.load` reads
        it. A file that is there is replaced, as a whole or not at all.

        Raises:
            ImportError: safetensors is not installed.
            ArgumentError: a map is sparse, quantized or nested, or of a type that the format lacks.
            MapStateError: a map cannot be read any more.
            DistributedError: a map is a `DTensor`.
        """
        save(self._snapshot(), path)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu"
    ) -> FeatureMaps:
        """The maps in a file that `save` wrote, to be read as those of a capture.

        Layers are selected by name: of the model itself, nothing is left.

        Args:
            path: of the file.
            device: where the values go.

        Raises:
            ImportError: safetensors is not installed.
            FileNotFoundError: there is no such file.
            ArgumentError: it is no file that `save` wrote, or of a later version.
        """
        return cls(KeptSession(load(path, device)))

    def _snapshot(self) -> Snapshot:
        return snapshot_of(self._session, read)

    def __copy__(self) -> FeatureMaps:
        return FeatureMaps(KeptSession(self._snapshot()))

    def __deepcopy__(self, memo: Any) -> FeatureMaps:
        return self.__copy__()

    def __reduce__(self) -> tuple[Any, ...]:
        return _of_snapshot, (self._snapshot(),)

    # -- to look at ---------------------------------------------------------------------------

    if TYPE_CHECKING:
        plot = drawing.plot_maps
        """Draw z and a of each layer by filter (extra: `plot`): `fmapkit.plot.plot_maps`."""
        plot_filters = drawing.plot_filters
        """Draw the weights of a layer's filters (extra: `plot`): `fmapkit.plot.plot_filters`."""
        to_html = page.write_maps
        """Write the latest pass as a page to share, one HTML file: `fmapkit.page.write_maps`."""
    else:
        plot = LazyMethod("fmapkit.plot", "plot_maps")
        plot_filters = LazyMethod("fmapkit.plot", "plot_filters")
        to_html = LazyMethod("fmapkit.page", "write_maps")

    def __repr__(self) -> str:
        return maps_table(self._session).text()

    def _repr_html_(self) -> str:
        return maps_table(self._session).html()


def _of_snapshot(snapshot: Snapshot) -> FeatureMaps:
    return FeatureMaps(KeptSession(snapshot))


def _numbers(ids: Tensor | Iterable[int]) -> Tensor:
    """Whole numbers in a row."""
    try:
        numbers = ids if isinstance(ids, Tensor) else list(ids)
        found = torch.as_tensor(numbers if len(numbers) else torch.empty(0, dtype=torch.int64))
    except (TypeError, ValueError, RuntimeError):
        found = None
    whole = found is not None and not found.is_floating_point() and not found.is_complex()
    if found is None or not whole or found.dim() != 1 or found.dtype == torch.bool:
        raise ArgumentError(
            f"batch takes a whole number for each input of the next pass, in one row, not {ids!r}"
        )
    return found.detach().to(torch.int64)
