"""The weight and the bias of a layer, by filter: where they are, and which rows made a map.

While a pass is traced, each call of a layer notes how it got its weight (`Made`): the place of
the parameter, and which view of it. That is a matter of the model's code, so it holds for later
passes on the same path, and reading `fm.weight` costs nothing until somebody does. A weight that
is computed in the pass (weight norm, a low-rank sum, data) is nowhere afterwards: it is there for
`capture(weights=True)` alone, which holds it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fmapkit.errors import (
    DistributedError,
    FilterRangeError,
    KindNotCapturedError,
    MapOverwrittenError,
    MapReleasedError,
)
from fmapkit.provenance.labels import Made, OfModule, Origin, ParamLabel, Source
from fmapkit.provenance.layout import ChannelLayout
from fmapkit.torchlib.memory import storage_of, version_of
from fmapkit.torchlib.sharded import is_dtensor

PACKED = "it is quantised, and its weight is packed with its bias, which is no tensor"
REGISTERED = "it is a layer by register_layer, and which weights it uses is not known"

# Of each parameter and buffer, by its module's id and its key: itself, and its version.
Versions = dict[tuple[int, str], tuple[Tensor, int]]
# A module, and the key of a buffer of it; and which tensor that was in a pass.
BufferPlace = tuple[Callable[[], nn.Module | None], str]
Buffers = dict[tuple[int, str], "weakref.ref[Tensor]"]
# By the id of the first of each pair.
StandIns = dict[int, tuple[Tensor, Tensor]]
Owners = Callable[[Tensor], Sequence[tuple[nn.Module, str]]]


# -- while a pass is traced ----------------------------------------------------------------------


def source_of(value: Tensor, label: Any, owners: Owners, stand_ins: StandIns) -> Source:
    """Where a tensor that a layer uses is to be found again.

    Args:
        label: what it carries.
        owners: the modules that have a parameter or buffer, each with its key there.
        stand_ins: where a graph is traced: the tensors that stand for its inputs, and these.
    """
    if isinstance(label, ParamLabel):
        root = there = label.parameter
        if stand_ins:
            there = next((fake for fake, real in stand_ins.values() if real is root), root)
    else:
        there = value if value._base is None else value._base  # a view of a buffer
        root = stand_ins[id(there)][1] if id(there) in stand_ins else there
    places = owners(root)
    if not places:
        return Source()
    module, key = places[0]
    owner = weakref.ref(module)
    # What is known of a graph outlives blocks, and its weights have weak references anyway.
    ref: Any = weakref.ref(root) if stand_ins else OfModule(module, root)
    if value is there:
        return Source(owner, key, ref)
    if value.dtype != there.dtype or storage_of(value) != storage_of(there):
        return Source()
    offset = int(value.storage_offset() - there.storage_offset())
    view = (tuple(value.shape), value.stride(), offset, tuple(root.shape), root.stride())
    return Source(owner, key, ref, view)


def versions(modules: Iterable[nn.Module]) -> Versions:
    """Each parameter and buffer by its module's id and its key, and how often it was written to."""
    return {
        (id(module), key): (tensor, version_of(tensor))
        for module in modules
        for registered in (module._parameters, module._buffers)
        for key, tensor in registered.items()
        if tensor is not None
    }


def note_exchanged(sources: Iterable[Source]) -> None:
    """A pass has ended: which of the weights that were used are not where they were.

    So it is in every pass on the same path.
    """
    for source in sources:
        if isinstance(source.ref, OfModule):
            source.ref.compare(source.key)


def buffers_of(made: Iterable[Made | None]) -> tuple[BufferPlace, ...]:
    """Where layers have found a weight, or a bias, that a forward may exchange for another one."""
    found: dict[tuple[int, str], BufferPlace] = {}
    for source in (s for m in made if m is not None for s in (m.weight, m.bias) if s is not None):
        owner = source.owner() if source.owner is not None else None
        if owner is not None and source.owner is not None and source.key in owner._buffers:
            found[id(owner), source.key] = source.owner, source.key
    return tuple(found.values())


def buffers_at(places: Iterable[BufferPlace]) -> Buffers:
    """The tensors that are at some places, by their module's id and their key there."""
    owners = ((owner(), key) for owner, key in places)
    found = {(id(m), key): m._buffers.get(key) for m, key in owners if m is not None}
    return {place: weakref.ref(tensor) for place, tensor in found.items() if tensor is not None}


# -- when it is read -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WeightRows:
    """What is known of the weights behind one map."""

    what: str  # the map, for messages
    origin: Origin  # the call of the layer that made it
    axes: ChannelLayout | None  # where its filters lie
    picked: tuple[int, ...] | None  # those that are held, where not all are
    # Of the pass's parameters, as `versions` gives them; empty while it is under way, None where
    # they were not asked for.
    versions: Versions | None
    buffers: Buffers  # as they were when a call ended that was read by a plan

    def __reduce__(self) -> Any:
        """A copy of a map, or a pickle, has its values and tags alone."""
        return Lost, (self.what,)

    def read(self, name: str, filter: int | None = None) -> Tensor | None:
        """The rows of the weight or bias that belong to the map, or to one of its filters.

        Args:
            name: "weight" or "bias".
            filter: by the layer's numbering; None for all of the map's.

        Raises:
            KindNotCapturedError: the layer's is no tensor that is still there.
            FilterRangeError: which filters made the map is not known.
            MapOverwrittenError: it was written to since.
            DistributedError: other ranks have parts of it.
        """
        made = self.origin.made
        assert made is not None
        if made.why:
            raise KindNotCapturedError(f"{self.what} has no {name} to be read: {made.why}")
        source = made.weight if name == "weight" else made.bias
        if source is None:
            return None
        if made.axes is None or self.axes is None:
            raise FilterRangeError(
                f"which rows of its layer's {name} made {self.what} is not known: its filters do "
                "not lie along axes of their own"
            )
        with torch.no_grad():
            value = self._tensor(source, name)
            if value.layout is not torch.strided:
                raise KindNotCapturedError(
                    f"the {name} behind {self.what} is sparse, and has no rows to look at: read it "
                    "from its module, with to_dense()"
                )
            rows = _blocks(value, made) if name == "weight" else self._bias(value, made)
            grouped = rows.dim() > value.dim()
            if filter is not None:
                place = _decoded(filter - made.axes.offset, made.axes)
                return rows[divmod(place[0], rows.shape[1]) if grouped else tuple(place)]
            rows = rows.flatten(0, 1) if grouped else rows
            return _of_map(rows, made.axes, self.axes, self.picked)

    def _bias(self, value: Tensor, made: Made) -> Tensor:
        assert made.axes is not None
        if len(made.places) == 1 and value.numel() == made.axes.parts[0].size:
            return value.reshape(-1)
        raise FilterRangeError(
            f"the bias behind {self.what} has the shape {tuple(value.shape)}: it is not one "
            "number for each filter"
        )

    def _tensor(self, source: Source, name: str) -> Tensor:
        """The tensor that the layer used."""
        if source.owner is None:
            held = (self.origin.used or {}).get(name)
            if held is None:
                raise KindNotCapturedError(
                    f"the {name} behind {self.what} was computed in the pass, and was not held; "
                    "capture(model, weights=True) holds it (an eager model is traced there in each "
                    "pass)"
                )
            used: Tensor = held.read(f"the {name} behind {self.what}")
            return used
        found = self._parameter(source, name)
        if source.view is None:
            return found
        shape, strides, offset, root_shape, root_strides = source.view
        if tuple(found.shape) != root_shape or found.stride() != root_strides:
            raise MapOverwrittenError(
                f"the parameter {source.key!r}, of which the {name} behind {self.what} is a part, "
                f"has another shape or layout than when the layer was learned"
            )
        return found.as_strided(shape, strides, found.storage_offset() + offset)

    def _parameter(self, source: Source, name: str) -> Tensor:
        assert source.owner is not None and source.ref is not None
        owner, key = source.owner(), source.key
        if owner is None:
            raise MapReleasedError(f"the {name} behind {self.what} went with its module")
        now: Tensor | None = owner._parameters.get(key)
        now = owner._buffers.get(key) if now is None else now
        used = self.buffers.get((id(owner), key), source.ref)
        exchanged = isinstance(source.ref, OfModule) and source.ref.exchanged
        if exchanged and not (now is not None and is_dtensor(now)):
            raise MapOverwrittenError(
                f"the {name} behind {self.what} was exchanged for another tensor in the pass, "
                "after the layer had used it; clone it in the forward, where it is used"
            )
        if self.versions:
            then, version = self.versions.get((id(owner), key), (None, -1))
            if then is None or version_of(then) != version:
                raise MapOverwrittenError(
                    f"the {name} behind {self.what} was written to after the pass; read and clone "
                    "it before the optimiser's step"
                )
            found = then
        elif now is None or now is not used():
            raise MapOverwrittenError(
                f"the {name} behind {self.what} is another tensor now than when the layer was "
                "learned (functional_call, load_state_dict(assign=True) and the like swap "
                "parameters); capture(model, weights=True) holds those of each pass"
            )
        else:
            found = now
        if is_dtensor(found):
            raise DistributedError(
                f"the {name} behind {self.what} is a DTensor: other ranks have parts of it; "
                f"its full_tensor() puts it together"
            )
        return found.detach()


@dataclass(frozen=True, slots=True)
class Lost:
    """The same of a copied map."""

    what: str

    def read(self, name: str, filter: int | None = None) -> Tensor | None:
        """Say that there is none.

        Raises:
            MapReleasedError: always.
        """
        raise MapReleasedError(
            f"{self.what} was copied, pickled or saved, and its {name} stayed with the model: read "
            "it from the map that was captured"
        )


def _blocks(weight: Tensor, made: Made) -> Tensor:
    """The weight with the axes that count filters first, in the order of the result's.

    Of a transposed convolution with groups: (groups, out / groups, in / groups, ...).
    """
    assert made.axes is not None
    if len(made.places) == 1:
        axis = made.places[0][1]
        groups = made.axes.parts[0].size // max(weight.shape[axis], 1)
        if groups > 1:  # where it is (in, out / groups, ...)
            return weight.view(groups, -1, *weight.shape[1:]).transpose(1, 2)
        return weight.movedim(axis, 0)
    places = dict(made.places)
    return weight.movedim([places[p.dim] for p in made.axes.parts], list(range(len(places))))


def _decoded(number: int, axes: ChannelLayout) -> list[int]:
    """Where a filter lies along the axes, its number being counted from their offset."""
    found: dict[int, int] = {}
    for part in sorted(axes.parts, key=lambda p: -p.stride):
        found[part.dim], number = divmod(number, part.stride)
    return [found[part.dim] for part in axes.parts]


def _of_map(
    rows: Tensor, made: ChannelLayout, axes: ChannelLayout, picked: tuple[int, ...] | None
) -> Tensor:
    """The rows of the filters that a map has, lying as they do there; a view where there is one."""
    if picked is None and len(made.parts) == 1:
        step, stride = made.parts[0].stride, rows.stride(0)
        if all(p.stride % step == 0 for p in axes.parts):
            sizes = [p.size for p in axes.parts]
            strides = [p.stride // step * stride for p in axes.parts]
            first = rows.storage_offset() + (axes.offset - made.offset) // step * stride
            return rows.as_strided((*sizes, *rows.shape[1:]), (*strides, *rows.stride()[1:]), first)
    if picked is None and axes.parts == made.parts and axes.offset == made.offset:
        return rows
    numbers = picked if picked is not None else _numbers(axes)
    found = torch.stack([rows[tuple(_decoded(n - made.offset, made))] for n in numbers])
    if picked is None:
        found = found.view(*(p.size for p in axes.parts), *rows.shape[len(made.parts) :])
    return found


def _numbers(axes: ChannelLayout) -> list[int]:
    """Every filter, in the order in which they lie."""
    found = [axes.offset]
    for part in axes.parts:
        found = [n + i * part.stride for n in found for i in range(part.size)]
    return found
