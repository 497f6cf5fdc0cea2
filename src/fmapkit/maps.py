"""What the user reads: `FeatureMap`, one map with its tags, and `FeatureMaps`, all of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fmapkit import _table
from fmapkit._gather import gather
from fmapkit._gradients import Gradient
from fmapkit._sharded import Parts, ends_of, is_dtensor, splits, whole
from fmapkit._store import Entry
from fmapkit._wants import KINDS
from fmapkit.errors import (
    AmbiguousMapError,
    ArgumentError,
    DistributedError,
    FilterRangeError,
    KindNotCapturedError,
    MapLookupError,
    NoActivationError,
    NoPassError,
    UnknownLayerError,
    did_you_mean,
    listed,
)
from fmapkit.layers import layer_axis
from fmapkit.selectors import selectors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fmapkit._session import Missed, Session

__all__ = ["FeatureMap", "FeatureMaps"]


@dataclass(frozen=True, slots=True, eq=False)
class FeatureMap:
    """One feature map: a tensor and what it is.

    Attributes:
        tensor: the values, on the model's device, outside the autograd graph. It is the model's own
            memory wherever that was not overwritten: clone it before you write to it.
        kind: "input", "response", "preactivation" (z), "activation" (a = σ(z)) or "output".
        layer: qualified name of the module whose filters made the map.
        filter: index of the filter, or None for all of them.
        call: which call of the layer in the pass, from 0.
        step: which forward pass in the block, from 0.
        nonlinearity: σ, e.g. "relu"; None where there is none.
        path: place in a nested output, e.g. "[0]" or ".logits"; else "".
        filter_dim: axis of `tensor` that counts filters; None if there is none, or after `[k]`.
        filters: the filters that lie along that axis, in order; None if there is no such axis.
        edited: what went on in the map's place, where `capture(edit=...)` changed it; else None.
        parts: of a tensor that is one rank's part of the map, what `full()` needs.
    """

    tensor: Tensor = field(repr=False)
    kind: str
    layer: str
    filter: int | None = None
    call: int = 0
    step: int = 0
    nonlinearity: str | None = None
    path: str = ""
    filter_dim: int | None = None
    filters: range | tuple[int, ...] | None = field(default=None, repr=False)
    edited: Tensor | None = field(default=None, repr=False)
    parts: Parts | None = field(default=None, repr=False)
    _gradient: Gradient | None = field(default=None, repr=False)
    _whole: FeatureMap | None = field(default=None, repr=False)  # the map of all filters

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor."""
        return self.tensor.shape

    @property
    def dtype(self) -> torch.dtype:
        """Type of the values, as the model made them."""
        return self.tensor.dtype

    @property
    def device(self) -> torch.device:
        """Where the values are."""
        return self.tensor.device

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes; of a `DTensor`, of this rank's part."""
        return _nbytes(self.tensor)

    @property
    def grad(self) -> Tensor | None:
        """Gradient with respect to the map: dL/dz of a preactivation, dL/da of an activation.

        Asked for with `capture(gradients=True)`, or `fm.tensor.retain_grad()` where the maps are in
        the graph. It is the tensor that backward made, not a copy, and the sum over several
        backward passes. None before backward, and where none gets to the map. Of one filter's map,
        that filter's part, as a view.

        Raises:
            MapOverwrittenError: its memory was written to after backward.
        """
        if self._whole is not None:
            whole, dim = self._whole.grad, self._whole.filter_dim
            assert dim is not None and self.filter is not None
            there = self._whole._along()
            return None if whole is None else whole.select(dim, there.index(self.filter))
        if self._gradient is not None:
            return self._gradient.read(f"the {self.kind} of layer {self.layer!r}")
        tensor = self.tensor
        # torch warns of a look at the gradient of a tensor that was never going to have one.
        return tensor.grad if tensor.is_leaf or tensor.retains_grad else None

    def numpy(self) -> np.ndarray[Any, Any]:
        """The values as a NumPy array; bfloat16, which NumPy lacks, as float32.

        Raises:
            DistributedError: the tensor is a `DTensor`.
        """
        if is_dtensor(self.tensor):
            raise DistributedError(_of_several_ranks(self, "has no values of its own"))
        tensor = self.tensor.detach().cpu()
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        array = self.numpy()
        if dtype is not None and array.dtype != dtype:
            return array.astype(dtype)
        return array.copy() if copy else array

    def __len__(self) -> int:
        """Number of filters held.

        Raises:
            FilterRangeError: the map has no filter axis.
        """
        return len(self._along())

    def __bool__(self) -> bool:
        """A map is there, whether or not its filters can be counted."""
        return True

    def __getitem__(self, index: int) -> FeatureMap:
        """The map of one filter, by the layer's own numbering: a view, never a copy.

        Raises:
            FilterRangeError: the map has no filter axis, or does not hold that filter.
            DistributedError: the tensor is a `DTensor`, and the filter may be on another rank.
        """
        there = self._along()
        if isinstance(index, bool) or not isinstance(index, (int, np.integer)):
            raise FilterRangeError(f"a filter is an int, not {index!r}; use .tensor to slice")
        index = int(index)
        wanted = index if index >= 0 else there[-1] + 1 + index
        if wanted not in there:
            raise FilterRangeError(
                f"filter {index} is out of range for the {self.kind} of layer {self.layer!r}, "
                f"which holds {len(there)} filters ({_span(there)})"
            )
        assert self.filter_dim is not None
        if is_dtensor(self.tensor):  # torch would ask the other ranks
            raise DistributedError(_of_several_ranks(self, "is not indexed here"))
        place = there.index(wanted)
        edited = self.edited.select(self.filter_dim, place) if self.edited is not None else None
        return replace(
            self,
            tensor=self.tensor.select(self.filter_dim, place),
            edited=edited,
            filter=wanted,
            filter_dim=None,
            filters=None,
            parts=self.parts if self.parts is not None and self.parts.unknown else None,
            _whole=self,
        )

    def __iter__(self) -> Iterator[FeatureMap]:
        """The map of each filter, in order."""
        for index in self._along():
            yield self[index]

    def _along(self) -> range | tuple[int, ...]:
        if self.filters is None or self.filter_dim is None:
            raise FilterRangeError(
                f"the {self.kind} of layer {self.layer!r} has no single filter axis"
                + (f"; it is filter {self.filter} already" if self.filter is not None else "")
            )
        return self.filters

    def full(self) -> FeatureMap:
        """The whole map, where the tensor is one rank's part of it (tensor parallel).

        A collective: every rank that has a part of the map has to call it. A map that is whole
        already comes back as it is, without one.

        Raises:
            DistributedError: nobody knows whether the tensor is whole.
        """
        if self.parts is None and not is_dtensor(self.tensor):
            return self
        parts = self.parts or Parts()
        if parts.unknown and not is_dtensor(self.tensor):
            raise DistributedError(
                f"the {self.kind} of layer {self.layer!r} is a plain tensor of this rank, behind a "
                "weight that is spread over ranks: whether other ranks hold other parts of it is "
                "known to the model alone; use .tensor"
            )
        tensor, edited = (
            whole(t, parts.mesh, self.filter_dim, parts.total) if t is not None else None
            for t in (self.tensor, self.edited)
        )
        assert tensor is not None
        filters = self.filters
        if parts.total and self.filter_dim is not None:
            filters = range(parts.total)
        return replace(
            self,
            tensor=tensor,
            edited=edited,
            filters=filters,
            parts=None,
            _gradient=None,
            _whole=None,
        )

    def __repr__(self) -> str:
        return _table.map_line(self)

    def plot(self, **options: Any) -> Figure:
        """Draw the map, a picture for each filter (extra: `plot`); see `fmapkit.plot.plot_map`."""
        from fmapkit import plot

        return plot.plot_map(self, **options)


def _nbytes(tensor: Tensor) -> int:
    tensor = ends_of(tensor)[-1]
    return tensor.numel() * tensor.element_size()


def _of_several_ranks(fm: FeatureMap, why: str) -> str:
    return (
        f"the {fm.kind} of layer {fm.layer!r} is a DTensor over several ranks, and {why}: "
        "full() puts it together (every rank has to call it), .tensor.to_local() is this rank's "
        "part"
    )


def _span(filters: range | tuple[int, ...]) -> str:
    if isinstance(filters, range) and filters.step == 1:
        return f"{filters[0]} to {filters[-1]}"
    return ", ".join(map(str, filters))


Key = str | tuple[str, str] | tuple[str, str, int]


class FeatureMaps:
    """The maps of a capture; readable during the block and after it.

    A look-up (`maps[layer]`, `maps[layer, kind]`, `maps[layer, kind, filter]`) and iteration read
    the latest pass; `select` reads every pass that is kept.
    """

    def __init__(self, session: Session) -> None:
        self._session = session

    # -- the latest pass ----------------------------------------------------------------------

    def _latest(self) -> list[tuple[int, Entry]]:
        latest = self._session.store.latest()
        return [(latest.step, e) for e in latest.entries()] if latest is not None else []

    def _every(self) -> list[tuple[int, Entry]]:
        return [(p.step, e) for p in self._session.store for e in p.entries()]

    def __iter__(self) -> Iterator[FeatureMap]:
        """Every map of the latest pass, in execution order."""
        for step, entry in self._latest():
            yield self._read(step, entry)

    def __len__(self) -> int:
        """How many maps the latest pass holds."""
        return len(self._latest())

    @property
    def layers(self) -> list[str]:
        """The layers that have maps in the latest pass, in execution order."""
        return list(dict.fromkeys(e.origin.name for _, e in self._latest()))

    def __contains__(self, layer: object) -> bool:
        return any(e.origin.name == layer for _, e in self._latest())

    def __getitem__(self, key: Key) -> FeatureMap:
        """One map of the latest pass.

        Args:
            key: a layer (its activation; of a module that is no filter layer, its output), or
                (layer, kind), or (layer, kind, filter).

        Raises:
            NoPassError: nothing has been captured yet.
            UnknownLayerError: no map of such a layer.
            NoActivationError: no nonlinearity follows it.
            KindNotCapturedError: it has no map of that kind.
            AmbiguousMapError: several maps answer.
            FilterRangeError: it has no such filter.
        """
        layer, kind, index = _parse(key)
        return self._find(layer, kind, index, self._latest())

    def _find(
        self, layer: str, kind: str | None, index: int | None, entries: list[tuple[int, Entry]]
    ) -> FeatureMap:
        """The one map of the entries that is meant."""
        if not entries and self._session.store.latest() is None:
            self._nothing(layer)
        of_layer = [(s, e) for s, e in entries if e.origin.name == layer]
        if not of_layer:
            of_layer = self._owned(layer, entries)
        found = [(s, e) for s, e in of_layer if e.kind == kind]
        if kind is None:
            found = [(s, e) for s, e in of_layer if e.kind == "activation"]
            if not found and not self._is_layer(layer):
                found = [(s, e) for s, e in of_layer if e.kind == "output"]
        if not found:
            self._missing(layer, kind, [e for _, e in of_layer])
        if len(found) > 1:
            raise AmbiguousMapError(_ambiguous(layer, kind, [e for _, e in found]))
        result = self._read(*found[0])
        return result if index is None else result[index]

    def _is_layer(self, name: str) -> bool:
        module = self._session.names.by_name.get(name)
        return module is not None and layer_axis(module) is not None

    def _owned(self, layer: str, entries: list[Any]) -> list[Any]:
        """Layers inside a module go by the module's name where that means one: `attn.in_proj`."""
        names = self._session.names
        module = names.by_name.get(layer)
        found = []
        if module is not None:
            mine = {
                f"{layer}.{k.removesuffix('_weight')}".lstrip(".")
                for k in names.parameters_of(module)
            }
            found = [
                (s, e)
                for s, e in entries
                if e.origin.name in mine or e.origin.name.startswith(f"{layer}:")
            ]
        if found:
            return found
        known = list(dict.fromkeys(e.origin.name for _, e in entries))
        hint = did_you_mean(layer, known)
        if module is not None:
            if not self._session.wants.layer(layer):
                raise UnknownLayerError(
                    f"layer {layer!r} was not selected in capture(layers=...); "
                    f"captured: {listed(known)}"
                )
            if self._is_layer(layer) and self._session.wants.kinds == {"activation"}:
                raise NoActivationError(
                    f"layer {layer!r} has no activation in the latest pass: no nonlinearity "
                    "follows it, or it did not run; capture(kinds=...) asked for nothing else"
                )
            raise UnknownLayerError(
                f"no map of {layer!r} in the latest pass: either it did not run, or no filter of "
                f"its own reached a nonlinearity; for what it returns, capture(model, "
                f"layers={layer!r}, kinds='output'){hint} (captured: {listed(known)})"
            )
        raise UnknownLayerError(f"no layer {layer!r}{hint} (captured: {listed(known)})")

    def _nothing(self, layer: str) -> None:
        session = self._session
        if not session._steps:
            raise NoPassError(
                f"no map of {layer!r} yet: no forward pass has run inside the capture block; "
                "call the model inside `with capture(model) as maps:` first"
            )
        why = f"; missed: {listed(m.reason for m in session.missed)}" if session.missed else ""
        raise NoPassError(f"no maps are held{why} (clear() was called, or nothing was captured)")

    def _missing(self, layer: str, kind: str | None, there: list[Entry]) -> None:
        kinds = list(dict.fromkeys(e.kind for e in there))
        asked = self._session.wants.kinds
        if kind in (None, "activation") and ("activation" in asked or kind is None):
            if "activation" in asked or kind == "activation":
                raise NoActivationError(
                    f"layer {layer!r} has no activation: no nonlinearity follows it; "
                    f"ask for maps[{layer!r}, {kinds[0]!r}]"
                )
            raise KindNotCapturedError(
                f"the activation of {layer!r} was not asked for in capture(kinds=...); "
                f"held of it: {listed(kinds)}"
            )
        if kind not in asked and kind != "output":
            raise KindNotCapturedError(
                f"kind {kind!r} was not asked for in capture(kinds=...); "
                f"held of {layer!r}: {listed(kinds)}"
            )
        raise KindNotCapturedError(
            f"layer {layer!r} has no {kind} in the latest pass; held of it: {listed(kinds)}"
        )

    # -- every pass that is kept --------------------------------------------------------------

    def select(
        self,
        layer: Any = None,
        kind: str | None = None,
        filter: int | None = None,
        call: int | None = None,
        step: int | None = None,
        *,
        nonlinearity: str | None = None,
        path: str | None = None,
    ) -> list[FeatureMap]:
        """Every map that fits, over all passes that are kept, in execution order.

        Args:
            layer: a name, glob, regex, module, module type or callable, or several of these.
            kind: one of the five kinds.
            filter: only this filter of each map (a view); maps without it are left out.
            call: only this call of each layer.
            step: only this pass; -1 is the latest.
            nonlinearity: only maps of this σ.
            path: only this place in a nested output.

        Raises:
            ArgumentError: an argument is of no allowed form.
        """
        if kind is not None and kind not in KINDS:
            hint = did_you_mean(kind, KINDS) if isinstance(kind, str) else ""
            raise ArgumentError(f"unknown kind {kind!r}{hint}; the kinds are {listed(KINDS)}")
        names = self._session.names
        chosen = None if layer is None else selectors(layer)
        step = self._step(step)
        found = []
        for at, entry in self._every():
            name = entry.origin.name
            if kind is not None and entry.kind != kind:
                continue
            if step is not None and at != step:
                continue
            if call is not None and entry.origin.call != call:
                continue
            if nonlinearity is not None and entry.sigma != nonlinearity:
                continue
            if path is not None and entry.path != path:
                continue
            module: nn.Module | None = names.module_of(name)
            if chosen is not None and not any(s.matches(name, module) for s in chosen):
                continue
            result = self._read(at, entry)
            if filter is not None:
                if result.filters is None or filter not in result.filters:
                    continue
                result = result[filter]
            found.append(result)
        return found

    def _step(self, step: int | None) -> int | None:
        """A pass by its number; -1 is the latest of those kept."""
        held = [p.step for p in self._session.store]
        if step is not None and step < 0:
            return held[step] if -step <= len(held) else -1
        return step

    def gather(
        self,
        layer: str,
        kind: str | None = None,
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

        def find() -> FeatureMap:
            key = (layer,) if kind is None else (layer, kind)
            name, wanted, _ = _parse(key)
            at = self._step(step)
            entries = self._latest() if at is None else [p for p in self._every() if p[0] == at]
            if call is not None:
                entries = [p for p in entries if p[1].origin.call == call]
            return self._find(name, wanted, filter, entries)

        asked = ", ".join(repr(v) for v in (layer, kind, filter) if v is not None)
        return gather(find, dim, dst, group, asked)

    def _read(self, step: int, entry: Entry) -> FeatureMap:
        result = _read(step, entry)
        parts = self._parts(entry, result)
        return result if parts is None else replace(result, parts=parts)

    def _parts(self, entry: Entry, found: FeatureMap) -> Parts | None:
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
        seen: dict[int, int] = {}
        for _, entry in self._every():
            tensor = entry.held.tensor if entry.held is not None else None
            if tensor is not None:
                storage = ends_of(tensor)[-1].untyped_storage()
                seen[storage._cdata] = storage.nbytes()
        return sum(seen.values())

    @property
    def bytes_copied(self) -> int:
        """Bytes that the latest pass copied, because the model overwrote a map."""
        copied = {
            id(e.held.tensor): _nbytes(e.held.tensor)
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

    # -- to look at ---------------------------------------------------------------------------

    def __repr__(self) -> str:
        return _table.text(self)

    def _repr_html_(self) -> str:
        return _table.html(self)

    def plot(self, layers: Any = None, **options: Any) -> Figure:
        """Draw z and a of each layer by filter (extra: `plot`); see `fmapkit.plot.plot_maps`."""
        from fmapkit import plot

        return plot.plot_maps(self, layers, **options)


def _parse(key: Any) -> tuple[str, str | None, int | None]:
    parts = key if isinstance(key, tuple) else (key,)
    if not 1 <= len(parts) <= 3 or not isinstance(parts[0], str):
        raise MapLookupError(
            f"maps[{key!r}]: the key is a layer's name, (layer, kind) or (layer, kind, filter)"
        )
    kind = parts[1] if len(parts) > 1 else None
    if kind is not None and kind not in KINDS:
        hint = did_you_mean(kind, KINDS) if isinstance(kind, str) else ""
        raise KindNotCapturedError(f"unknown kind {kind!r}{hint}; the kinds are {listed(KINDS)}")
    return parts[0], kind, parts[2] if len(parts) > 2 else None


def _ambiguous(layer: str, kind: str | None, entries: list[Entry]) -> str:
    choices = []
    for e in entries:
        says = [f"kind={e.kind!r}", f"call={e.origin.call}"]
        if e.sigma is not None:
            says.append(f"nonlinearity={e.sigma!r}")
        if e.path:
            says.append(f"path={e.path!r}")
        if e.origin.name != layer:
            says.append(f"layer={e.origin.name!r}")
        choices.append("(" + ", ".join(says) + ")")
    asked = f"maps[{layer!r}]" if kind is None else f"maps[{layer!r}, {kind!r}]"
    return (
        f"{asked} could mean {len(entries)} maps: {', '.join(choices[:8])}"
        f"{', …' if len(choices) > 8 else ''}; choose with maps.select(layer={layer!r}, call=…)"
    )


def _read(step: int, entry: Entry) -> FeatureMap:
    origin, axes = entry.origin, entry.axes
    what = f"the {entry.kind} of layer {origin.name!r} (step {step}, call {origin.call})"
    assert entry.held is not None
    tensor = entry.held.read(what)
    dim = axes.dim if axes is not None else None
    filters: range | tuple[int, ...] | None = axes.filters if axes is not None else None
    if entry.picked is not None:
        filters = entry.picked
    return FeatureMap(
        tensor=tensor,
        kind=entry.kind,
        layer=origin.name,
        call=origin.call,
        step=step,
        nonlinearity=entry.sigma,
        path=entry.path,
        filter_dim=dim,
        filters=filters if dim is not None else None,
        edited=entry.edited.read(f"the edit of {what}") if entry.edited is not None else None,
        _gradient=entry.held.gradient,
    )
