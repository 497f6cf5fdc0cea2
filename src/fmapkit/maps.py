"""What the user reads: `FeatureMaps`, all maps of a capture; `FeatureMap` is one of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fmapkit.errors import ArgumentError, CaptureStateError, did_you_mean, listed, near
from fmapkit.kinds import KINDS, Kind
from fmapkit.lookup import Found, check_held, check_only_names, find, gather, parse, table
from fmapkit.map import FeatureMap, nbytes_of, read_map
from fmapkit.saving import KeptEntry, KeptSession, Snapshot, snapshot_of
from fmapkit.selection import LayerSelection
from fmapkit.storage import MapRecord, Pass
from fmapkit.torchlib.sharded import Parts, is_dtensor, splits

if TYPE_CHECKING:
    import os
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fmapkit.checking import NonFinite
    from fmapkit.missed import Missed
    from fmapkit.session import Session

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

    def __init__(self, session: Session | KeptSession) -> None:
        self._session = session

    # -- the latest pass ----------------------------------------------------------------------

    def _latest(self) -> list[Found]:
        latest = self._session.store.latest()
        return self._of(latest) if latest is not None else []

    def _every(self) -> list[Found]:
        return [found for p in self._session.store for found in self._of(p)]

    def _of(self, at: Pass) -> list[Found]:
        asked = self._session.wants.asked
        return [(at, e) for e in at.entries() if asked(e.kind, e.origin.name)]

    def __iter__(self) -> Iterator[FeatureMap]:
        """Every map of the latest pass, in execution order."""
        for at, entry in self._latest():
            yield self._read(at, entry)

    def __len__(self) -> int:
        """How many maps the latest pass holds."""
        return len(self._latest())

    @property
    def layers(self) -> list[str]:
        """The layers that have maps in the latest pass, in execution order."""
        return list(dict.fromkeys(e.origin.name for _, e in self._latest()))

    def __contains__(self, layer: object) -> bool:
        name = self._session.names.canonical(layer) if isinstance(layer, str) else layer
        return any(e.origin.name == name for _, e in self._latest())

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
        kinds = dict.fromkeys((e.origin.name, e.kind) for _, e in self._latest())
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
        result = self._read(*find(self._session, layer, kind, self._latest()))
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
        if kind is not None and kind not in KINDS:
            raise ArgumentError(
                f"unknown kind {kind!r}{did_you_mean(kind, KINDS)}; the kinds are {listed(KINDS)}",
                candidates=near(kind, KINDS) or KINDS,
            )
        if training is not None and not isinstance(training, bool):
            raise ArgumentError(f"training must be True, False or None, not {training!r}")
        if layer is not None and layers is not None:
            raise ArgumentError("layer= and layers= are the same: give one of them")
        chosen = self._chosen(layers if layer is None else layer)
        step = self._step(step)
        found = []
        for at, entry in self._every():
            name = entry.origin.name
            if kind is not None and entry.kind != kind:
                continue
            if step is not None and at.step != step:
                continue
            if training is not None and at.training != training:
                continue
            if call is not None and entry.origin.call != call:
                continue
            if nonlinearity is not None and entry.sigma != nonlinearity:
                continue
            if path is not None and entry.path != path:
                continue
            if chosen is not None and not chosen.layer(name):
                continue
            result = self._read(at, entry)
            if filter is not None:
                if result.filters is None or filter not in result.filters:
                    continue
                result = result[filter]
            found.append(result)
        return found

    def _chosen(self, layers: Any) -> LayerSelection | None:
        if layers is None:
            return None
        session = self._session
        chosen = LayerSelection(session.names, layers)
        if isinstance(session, KeptSession):
            check_only_names(chosen)
        labels = dict.fromkeys(e.origin.name for _, e in self._every())
        check_held(chosen, session.names, list(labels), session.wants.layer)
        return chosen

    def _step(self, step: int | None) -> int | None:
        """A pass by its number; -1 is the latest of those kept."""
        held = [p.step for p in self._session.store]
        if step is not None and step < 0:
            return held[step] if -step <= len(held) else -1
        return step

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
            at = self._step(step)
            entries = self._latest()
            if at is not None:
                entries = [p for p in self._every() if p[0].step == at]
            if call is not None:
                entries = [p for p in entries if p[1].origin.call == call]
            found = self._read(*find(self._session, name, wanted, entries))
            return found if filter is None else found[filter]

        asked = ", ".join(repr(v) for v in (layer, kind, filter) if v is not None)
        return gather(mine, dim, dst, group, asked)

    def _read(self, at: Pass, entry: MapRecord, made: bool = False) -> FeatureMap:
        if isinstance(entry, KeptEntry):
            return entry.map
        result = read_map(at, entry, made)
        parts = self._parts(entry, result)
        return result if parts is None else replace(result, parts=parts)

    def _shown(self, at: Pass, entry: MapRecord) -> FeatureMap:
        """As an analysis sees it."""
        return self._read(at, entry, made=True)

    def _parts(self, entry: MapRecord, found: FeatureMap) -> Parts | None:
        """Whether the tensor may be one rank's part: where the layer's weights are `DTensor`s."""
        names = self._session.names
        module = names.module_of(entry.origin.name)
        if module is None or is_dtensor(found.tensor):
            return None
        spread = [p for p in names.parameters_of(module).values() if is_dtensor(p)]
        if not spread:
            return None
        weight: Any = spread[0]
        mesh = weight.device_mesh
        if mesh.size() == 1 or (names.lent and mesh.ndim == 1):
            return None  # FSDP spreads it between passes only: the layer runs with the whole weight
        mesh, total = splits(weight), weight.shape[0]
        cut = found.filters is not None and len(found.filters) < total
        if mesh is None or not cut or entry.picked is not None:
            return Parts(unknown=True)
        return Parts(mesh, total)

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
            for _, e in self._latest()
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
        self._session.wants.retention.buffers.drop()

    def batch(self, ids: Tensor | Iterable[int]) -> None:
        """Number the inputs of the next pass: their places in the data set, say.

        Its maps have the numbers as `fm.ids`, and analyses that keep inputs apart go by them.

        Args:
            ids: one whole number for each entry of the first axis.

        Raises:
            ArgumentError: they are no whole numbers in a row.
            CaptureStateError: the maps were loaded, or copied: no pass will come.
        """
        if isinstance(self._session, KeptSession):
            raise CaptureStateError("batch() numbers the next pass; no pass of these will come")
        try:
            numbers = ids if isinstance(ids, Tensor) else list(ids)
            found = torch.as_tensor(numbers if len(numbers) else torch.empty(0, dtype=torch.int64))
        except (TypeError, ValueError, RuntimeError):
            found = None
        whole = found is not None and not found.is_floating_point() and not found.is_complex()
        if found is None or not whole or found.dim() != 1 or found.dtype == torch.bool:
            raise ArgumentError(
                f"batch takes a whole number for each input of the next pass, in one row, not "
                f"{ids!r}"
            )
        self._session.ids = found.detach().to(torch.int64)

    def first_nonfinite(self) -> NonFinite | None:
        """The first map held that has a NaN or an infinite value, over all passes that are kept.

        In execution order; it says which filter, and the largest finite value before it. None if
        every value is finite. Waits for the device, once. What is not held is not looked at:
        `capture(model, check="finite")` looks at every map of a pass, and at the gradients.

        Raises:
            MapStateError: a map cannot be read any more.
        """
        from fmapkit.checking import first_nonfinite

        return first_nonfinite(self._read(*found) for found in self._every())

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
        from fmapkit.saving import safetensors

        safetensors.save(self._snapshot(), path)

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
        from fmapkit.saving import safetensors

        return cls(KeptSession(safetensors.load(path, device)))

    def _snapshot(self) -> Snapshot:
        return snapshot_of(self._session, self._read)

    def __copy__(self) -> FeatureMaps:
        return FeatureMaps(KeptSession(self._snapshot()))

    def __deepcopy__(self, memo: Any) -> FeatureMaps:
        return self.__copy__()

    def __reduce__(self) -> tuple[Any, ...]:
        return _of_snapshot, (self._snapshot(),)

    # -- to look at ---------------------------------------------------------------------------

    def __repr__(self) -> str:
        return table.text(self)

    def _repr_html_(self) -> str:
        return table.html(self)

    def plot(
        self,
        layers: Any = None,
        *,
        sample: int = 0,
        filters: int | Iterable[int] | Literal["strongest"] | None = None,
        max_filters: int = 8,
        max_layers: int = 16,
        grid: tuple[int, int] | None = None,
        weights: bool = False,
        image: Any = None,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        title: str | None = None,
    ) -> Figure:
        """Draw z and a of each layer by filter (extra: `plot`).

        Arguments, result and errors are those of `fmapkit.plot.plot_maps`.
        """
        from fmapkit.plot import plot_maps

        return plot_maps(
            self,
            layers,
            sample=sample,
            filters=filters,
            max_filters=max_filters,
            max_layers=max_layers,
            grid=grid,
            weights=weights,
            image=image,
            mean=mean,
            std=std,
            title=title,
        )

    def plot_filters(
        self,
        layer: str,
        ax: Axes | None = None,
        *,
        filters: int | Iterable[int] | None = None,
        max_filters: int = 96,
        columns: int | None = None,
        shape: Sequence[int] | None = None,
        scale: Literal["layer", "filter"] = "layer",
    ) -> Figure:
        """Draw the weights of a layer's filters (extra: `plot`).

        Arguments, result and errors are those of `fmapkit.plot.plot_filters`.
        """
        from fmapkit.plot import plot_filters

        return plot_filters(
            self,
            layer,
            ax,
            filters=filters,
            max_filters=max_filters,
            columns=columns,
            shape=shape,
            scale=scale,
        )

    def to_html(
        self,
        path: str | os.PathLike[str],
        layers: Any = None,
        *,
        image: Any = None,
        sample: int = 0,
        max_filters: int = 1024,
        max_side: int = 56,
        grid: tuple[int, int] | None = None,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        analyses: Any = (),
        title: str | None = None,
    ) -> Path:
        """Write the latest pass as a page to share, one self-contained HTML file.

        Args:
            path: of the file; what is there is written over.
            layers: which layers: anything that `select(layer=...)` takes; None for all.
            image: what the model was given: (H, W), (C, H, W) or a batch (N, C, H, W), of one or
                three channels.
            sample: which sample of the batch.
            max_filters: how many filters of a map go in; of more, those with the highest |value|.
            max_side: larger images go in as means of blocks of pixels, in pixels a side.
            grid: of maps of tokens that are patches of an image: their rows and columns. Tokens
                before these, such as the class token, are left out.
            mean: of the image's channels, where it was normalised by it; with `std`.
            std: of the image's channels.
            analyses: analyses and Matplotlib figures that go in below the maps.
            title: of the page.

        Returns:
            The path.

        Raises:
            NoPassError: there are no maps yet.
            MapLookupError: `layers` selects none of the captured ones.
            MapStateError: a map cannot be read any more.
            ArgumentError: there is no such sample, a number is not positive, no map has the tokens
                of `grid`, or the image has another shape.
        """
        from fmapkit import page

        return page.write_maps(
            *(self, path, layers),
            image=image,
            sample=sample,
            max_filters=max_filters,
            max_side=max_side,
            grid=grid,
            mean=mean,
            std=std,
            analyses=analyses,
            title=title,
        )


def _of_snapshot(snapshot: Snapshot) -> FeatureMaps:
    return FeatureMaps(KeptSession(snapshot))
