"""One feature map: `FeatureMap`, a tensor with its tags, and how it is read from what is held."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from fmapkit._lazy import LazyMethod
from fmapkit.errors import DistributedError, FilterRangeError, FmapkitError, MapStateError
from fmapkit.kinds import Kind
from fmapkit.map.line import map_line
from fmapkit.provenance import Heads, Lost, WeightRows
from fmapkit.readable import tags
from fmapkit.storage import Block, Gradient, NotYet, Received, ValueCopies
from fmapkit.torchlib.memory import as_numpy, parts_of
from fmapkit.torchlib.sharded import Parts, is_dtensor, whole

if TYPE_CHECKING:
    from fmapkit.plot import plot_map


@dataclass(frozen=True, slots=True, eq=False)
class FeatureMap:
    """One feature map: a tensor and what it is.

    Attributes:
        tensor: the values, outside the autograd graph unless `detach=False` was asked for. It is
            the model's own memory, so clone it before you write to it; a copy where the model
            overwrote that, or where `filters=`, `dtype=` or `device=` ask for one.
        kind: "input", "response", "preactivation" (z), "activation" (a = σ(z)), "output" or
            "attention".
        layer: qualified name of the module whose filters made the map.
        filter: index of the filter, or None for all of them.
        call: which call of the layer in the pass, from 0.
        step: which forward pass in the block, from 0.
        training: whether the model was in training mode when that pass began.
        nonlinearity: σ, e.g. "relu"; None where there is none.
        path: place in a nested output, e.g. "[0]" or ".logits"; else "".
        filter_dim: axis of `tensor` that counts filters; None if there is none, or after `[k]`.
        filters: the filters that lie along that axis, in order; None if there is no such axis.
        edited: what went on in the map's place, where `capture(edit=...)` changed it; else None.
        ids: numbers of the inputs, (samples,) int64, where `maps.batch(...)` gave them; else None.
        parts: of a tensor that is one rank's part of the map, what `full()` needs.
        heads: of attention, the filters that are each head's queries, keys and values.
        mask: of one that an analysis is shown without its padding, (samples, positions), true where
            its rows were; else None.
        block: the block that made it: of two maps of one step, whether they are of one pass. None
            of a copy by pickle.
    """

    tensor: Tensor = field(repr=False)
    kind: Kind
    layer: str
    filter: int | None = None
    call: int = 0
    step: int = 0
    nonlinearity: str | None = None
    path: str = ""
    filter_dim: int | None = None
    filters: range | tuple[int, ...] | None = field(default=None, repr=False)
    edited: Tensor | None = field(default=None, repr=False)
    training: bool = False
    ids: Tensor | None = field(default=None, repr=False)
    parts: Parts | None = field(default=None, repr=False)
    heads: Heads | None = field(default=None, repr=False)
    mask: Tensor | None = field(default=None, repr=False)
    block: Block | None = field(default=None, repr=False)
    _gradient: Gradient | NotYet | Received | None = field(default=None, repr=False)
    _rows: WeightRows | Lost | None = field(default=None, repr=False)
    _whole: FeatureMap | None = field(default=None, repr=False)  # the map of all filters

    if TYPE_CHECKING:
        plot = plot_map
        """Draw the map, a picture for each filter (extra: `plot`): `fmapkit.plot.plot_map`."""
    else:
        plot = LazyMethod("fmapkit.plot", "plot_map")

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor."""
        return self.tensor.shape

    @property
    def dtype(self) -> torch.dtype:
        """Type of the values: the model's own, or what `capture(dtype=...)` asked for."""
        return self.tensor.dtype

    @property
    def device(self) -> torch.device:
        """Where the values are: with the model, or where `capture(device=...)` put them."""
        return self.tensor.device

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes; of a `DTensor`, of this rank's part."""
        return nbytes_of(self.tensor)

    @property
    def grad(self) -> Tensor | None:
        """Gradient with respect to the map: dL/dz of a preactivation, dL/da of an activation.

        Asked for with `capture(gradients=True)`, or `fm.tensor.retain_grad()` where the maps are in
        the graph. It is the tensor that backward made, not a copy, and the sum over several
        backward passes. None before backward, and where none gets to the map. Of one filter's map,
        that filter's part, as a view. `capture(dtype=..., device=...)` leave it as it was made.

        Raises:
            MapOverwrittenError: its memory was written to after backward.
            MapStateError: asked for in an analysis' `update`, which comes before backward.
        """
        if self._whole is not None:
            whole, dim = self._whole.grad, self._whole.filter_dim
            assert dim is not None and self.filter is not None
            there = self._whole._along()
            return None if whole is None else whole.select(dim, there.index(self.filter))
        if self._gradient is not None:
            try:
                return self._gradient.read(f"the {self.kind} of layer {self.layer!r}")
            except MapStateError as error:
                error.about(**tags(self))
                raise
        tensor = self.tensor
        # torch warns of a look at the gradient of a tensor that was never going to have one.
        return tensor.grad if tensor.is_leaf or tensor.retains_grad else None

    @property
    def weight(self) -> Tensor | None:
        """The weights of the filters that made the map, by filter, as the map itself is.

        (filters, in / groups, kH, kW) of a convolution, transposed ones too, (filters, in) of a
        linear layer: whatever axis counted filters where they were used comes first. Of one
        filter's map, that filter's. Where the map's filters lie along several axes (heads), so do
        these. None where no weighted layer made the map, and of an `"input"` or an `"output"`,
        which may have come from anywhere.

        It is a view of the parameter as it is now, outside the graph; a copy where there is no such
        view (some filters picked out, groups of a transposed convolution). Ask for
        `capture(weights=True)` to have the weights that were used, or an error if they were written
        to since; and for weights that are computed in each pass.

        Raises:
            KindNotCapturedError: the weight was computed in the pass, and not held, or is packed.
            FilterRangeError: which filters made the map is not known.
            MapOverwrittenError: the weight is another one now.
            DistributedError: other ranks have parts of it.
        """
        return self._read_rows("weight")

    @property
    def bias(self) -> Tensor | None:
        """The biases of these filters, (filters,), or one number; otherwise as `weight`.

        None where the layer's function was given none: a bias that is added afterwards is a step
        of its own.

        Raises:
            KindNotCapturedError: the bias was computed in the pass, and not held.
            FilterRangeError: it is not one number for each filter, or which made the map is not
                known.
            MapOverwrittenError: the bias is another one now.
            DistributedError: other ranks have parts of it.
        """
        return self._read_rows("bias")

    def _read_rows(self, name: Literal["weight", "bias"]) -> Tensor | None:
        try:
            return None if self._rows is None else self._rows.read(name, self.filter)
        except FmapkitError as error:
            error.about(**tags(self), filter=self.filter)
            raise

    def numpy(self) -> np.ndarray[Any, Any]:
        """The values as a NumPy array; bfloat16 and float8, which NumPy lacks, as float32.

        Raises:
            DistributedError: the tensor is a `DTensor`.
        """
        if is_dtensor(self.tensor):
            raise _of_several_ranks(self, "has no values of its own")
        return as_numpy(self.tensor)

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
            raise FilterRangeError(
                f"a filter is an int, not {index!r}; use .tensor to slice", **tags(self)
            )
        index = int(index)
        wanted = index if index >= 0 else there[-1] + 1 + index
        if wanted not in there:
            raise FilterRangeError(
                f"filter {index} is out of range for the {self.kind} of layer {self.layer!r}, "
                f"which holds {len(there)} filters ({_span(there)})",
                filter=index,
                candidates=there,
                **tags(self),
            )
        assert self.filter_dim is not None
        if is_dtensor(self.tensor):  # torch would ask the other ranks
            raise _of_several_ranks(self, "is not indexed here")
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
                + (f"; it is filter {self.filter} already" if self.filter is not None else ""),
                filter=self.filter,
                **tags(self),
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
                "known to the model alone; use .tensor",
                **tags(self),
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

    # -- copies: values and tags, without the model's memory, its graph or its hooks -----------

    def _copied(self, values: ValueCopies | None = None) -> FeatureMap:
        """The same map in memory of its own, outside the autograd graph.

        What `copy.deepcopy`, `pickle` and `torch.save` make of it. Its gradient so far is a part
        of it. Of what other ranks hold of the map, nothing is known any more.

        Args:
            values: makes the copies; maps that share memory share that of their copies, too.

        Raises:
            DistributedError: the tensor is a `DTensor`: `full()` first.
            MapOverwrittenError: the gradient's memory was written to after backward.
        """
        if is_dtensor(self.tensor):
            raise _of_several_ranks(self, "has no values of its own to be kept")
        values = values if values is not None else ValueCopies()
        grad = self.grad
        return replace(
            self,
            tensor=values.of(self.tensor),
            edited=None if self.edited is None else values.of(self.edited),
            parts=None if self.parts is None else Parts(unknown=True),
            _gradient=None if grad is None else Received(values.of(grad)),
            _rows=None if self._rows is None else Lost(self._rows.what),
            _whole=None,
        )

    def without_values(self) -> FeatureMap:
        """Its tags alone; the tensor is empty."""
        empty = self.tensor.new_empty(0)
        return replace(self, tensor=empty, edited=None, _gradient=None, _whole=None)

    def with_values(self, values: Tensor, filter_dim: int) -> FeatureMap:
        """Its tags with other values, whose filters lie along `filter_dim`."""
        return replace(
            self, tensor=values, filter_dim=filter_dim, edited=None, parts=None, _gradient=None
        )

    def __deepcopy__(self, memo: Any) -> FeatureMap:
        return self._copied()

    def __copy__(self) -> FeatureMap:
        return replace(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return restored, (self._copied()._data(),)

    def _data(self) -> dict[str, Any]:
        """What `restored` makes the map of again."""
        own = [f.name for f in fields(self) if not f.name.startswith("_") and f.name != "block"]
        tags = {name: getattr(self, name) for name in own}
        made_by = self._rows.what if self._rows is not None else None
        return {**tags, "grad": self.grad, "parts": self.parts is not None, "made_by": made_by}

    def __repr__(self) -> str:
        return map_line(self)


def restored(tags: dict[str, Any]) -> FeatureMap:
    """The map of which these are the tags, the tensor and its gradient."""
    values = dict(tags)
    grad, parts, made_by = values.pop("grad"), values.pop("parts"), values.pop("made_by")
    return FeatureMap(
        **values,
        parts=Parts(unknown=True) if parts else None,
        _gradient=None if grad is None else Received(grad),
        _rows=None if made_by is None else Lost(made_by),
    )


def nbytes_of(tensor: Tensor) -> int:
    """Size of the values in bytes; of a `DTensor`, of this rank's part."""
    return sum(part.numel() * part.element_size() for part in parts_of(tensor))


def _of_several_ranks(fm: FeatureMap, why: str) -> DistributedError:
    return DistributedError(
        f"the {fm.kind} of layer {fm.layer!r} is a DTensor over several ranks, and {why}: "
        "full() puts it together (every rank has to call it), .tensor.to_local() is this rank's "
        "part",
        **tags(fm),
    )


def _span(filters: range | tuple[int, ...]) -> str:
    if isinstance(filters, range) and filters.step == 1:
        return f"{filters[0]} to {filters[-1]}"
    return ", ".join(map(str, filters))
