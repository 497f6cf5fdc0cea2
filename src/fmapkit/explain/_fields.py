"""For each element of each tensor of a pass: the box of input locations that it depends on.

A *field* is stored beside its tensor as int32 rows (R, *shape): for each axis of the input the
first location and the negated last one, so that the field of a combination is the minimum of the
fields, row by row; and a last row that is 0 where a parameter takes part, else `NONE`. `NONE` in
all rows means: a constant. Fields are kept by storage, so that views and writes in place need no
rule; a rule is given an operator that has run as a `Call`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing import reductions

from fmapkit.errors import ArgumentError
from fmapkit.model import tensors_in
from fmapkit.torchlib.operators import is_traceable_wrapper_subclass

NONE = 1 << 24  # farther than any location; exact as a float32, for pooling kernels

_WeakRef: Any = reductions.StorageWeakRef  # its address is not used again while it lives


@dataclass(slots=True)
class _Kept:
    """The fields of one storage, element by element."""

    storage: Any
    itemsize: int
    rows: Tensor

    def resize(self, itemsize: int) -> None:
        """Count elements of another size: of a complex number the two parts, say."""
        if itemsize < self.itemsize:
            self.rows = self.rows.repeat_interleave(self.itemsize // itemsize, 1)
        elif itemsize > self.itemsize:
            ratio = itemsize // self.itemsize
            count = self.rows.shape[1] // ratio * ratio
            self.rows = self.rows[:, :count].reshape(len(self.rows), -1, ratio).amin(2)
        self.itemsize = itemsize


class Fields:
    """Fields of all tensors of a pass.

    Args:
        axes: how many axes of locations the input has.
        parameters: tensors whose values stand for any others.
    """

    def __init__(self, axes: int, parameters: Iterable[Tensor] = ()) -> None:
        self.rows = 2 * axes + 1
        self._kept: dict[int, _Kept] = {}
        # Weak references keep the addresses of the storages from being used again.
        self._parameters = {ref.cdata: ref for ref in map(_reference, parameters)}

    def of(self, tensor: Tensor) -> Tensor | None:
        """The field of a tensor, (R, *shape), as a view; None of a constant."""
        key = _reference(tensor).cdata
        kept = self._kept.get(key)
        if kept is None:
            if key not in self._parameters:
                return None
            rows = torch.full((self.rows,), NONE, dtype=torch.int32, device=tensor.device)
            rows[-1] = 0
            return rows.reshape(-1, *[1] * tensor.dim()).expand(-1, *tensor.shape)
        return self._view(kept, tensor)

    def put(self, tensor: Tensor, field: Tensor | None) -> None:
        """The tensor has this field now; None for a constant."""
        reference = _reference(tensor)
        kept = self._kept.get(reference.cdata)
        if kept is None:
            if field is None and reference.cdata not in self._parameters:
                return
            kept = self._make(reference, tensor)
        view = self._view(kept, tensor)
        if field is None:
            view.fill_(NONE)
        else:
            view.copy_(field)

    def same(self, one: Tensor, other: Tensor) -> bool:
        """Whether two tensors share their memory."""
        return bool(_reference(one).cdata == _reference(other).cdata)

    def _make(self, reference: Any, tensor: Tensor) -> _Kept:
        for key in [k for k, kept in self._kept.items() if kept.storage.expired()]:
            del self._kept[key]
        count = tensor.untyped_storage().nbytes() // tensor.element_size()
        rows = torch.full((self.rows, count), NONE, dtype=torch.int32, device=tensor.device)
        if reference.cdata in self._parameters:  # that is written to
            rows[-1] = 0
        kept = self._kept[reference.cdata] = _Kept(reference, tensor.element_size(), rows)
        return kept

    def _view(self, kept: _Kept, tensor: Tensor) -> Tensor:
        if kept.itemsize != tensor.element_size():
            kept.resize(tensor.element_size())
        rows = kept.rows
        return rows.as_strided(
            (len(rows), *tensor.shape),
            (rows.shape[1], *tensor.stride()),
            tensor.storage_offset(),
        )


def _reference(tensor: Tensor) -> Any:
    if is_traceable_wrapper_subclass(tensor) or tensor.layout != torch.strided or tensor.is_meta:
        raise ArgumentError(
            f"receptive_field follows plain tensors with values, and the model computes with a "
            f"{type(tensor).__name__} of layout {tensor.layout} on {tensor.device}"
        )
    return _WeakRef(tensor.untyped_storage())


def varies(field: Tensor | None, tensor: Tensor) -> Tensor:
    """Where a tensor may have another value: with another input, or other parameters."""
    if field is None:
        return torch.zeros_like(tensor, dtype=torch.bool)
    return (compact(field) < NONE).any(0).expand(tensor.shape)


def compact(field: Tensor) -> Tensor:
    """A field with one element along the axes where it was expanded."""
    for axis in range(1, field.dim()):
        if field.stride(axis) == 0 and field.shape[axis] > 1:
            field = field.narrow(axis, 0, 1)
    return field


def lowest(field: Tensor, axes: Sequence[int]) -> Tensor:
    """The field of what depends on all along some axes of a tensor; these stay, of one element."""
    if field.dim() == 1 or not axes:
        return field
    shape = list(field.shape)
    for axis in axes:
        shape[axis + 1] = 1
    inner = [a + 1 for a in axes]
    return compact(field).amin(inner, keepdim=True).expand(shape)


def reaches(field: Tensor | None) -> bool:
    """Whether anything of the input reaches the tensor."""
    return field is not None and bool((compact(field)[:-1] < NONE).any())


def least(fields: Sequence[Tensor | None], shape: Sequence[int]) -> Tensor | None:
    """The field of what is computed from several, element by element, broadcast to a shape."""
    there = [broadcast(field, shape) for field in fields if field is not None]
    return reduce(torch.minimum, there) if there else None


def broadcast(field: Tensor, shape: Sequence[int]) -> Tensor:
    """A field as that of a larger tensor, after the rules of broadcasting."""
    missing = len(shape) - (field.dim() - 1)
    sizes = field.shape[1:]
    return field.reshape(len(field), *[1] * missing, *sizes).expand(-1, *shape)


# -- operators ------------------------------------------------------------------------------


@dataclass
class Call:
    """One operator that has run, for the rule of it.

    Attributes:
        name: of the operator, without namespace, overload and the mark of its in-place form.
        given: its arguments by name, with the values from before the call.
        fields: of those arguments that are tensors and no constants, by `id`.
        results: the tensors that it returned or wrote to.
        assumed: is told where all of an operand is taken to matter.
    """

    name: str
    function: Any
    given: dict[str, Any]
    fields: dict[int, Tensor]
    results: list[Tensor]
    assumed: Callable[[str], None]

    def of(self, value: Any) -> Tensor | None:
        return self.fields.get(id(value)) if isinstance(value, Tensor) else None

    @property
    def field(self) -> Tensor:
        """Of `self`, the one operand of the operator."""
        found = self.of(self.given["self"])
        assert found is not None
        return found

    def get(self, *names: str, default: Any = None) -> Any:
        """An argument, by the first of these names that the operator has."""
        for name in names:
            if name in self.given:
                return self.given[name]
        return default

    def run(self, given: dict[str, Any]) -> Any:
        """What the operator gives for some arguments by name."""
        there = [a for a in self.function._schema.arguments if a.name in given]
        return self.function(
            *[given[a.name] for a in there if not a.kwarg_only],
            **{a.name: given[a.name] for a in there if a.kwarg_only},
        )

    @property
    def operands(self) -> list[Tensor]:
        return tensors_in(self.given)


def written(function: Any, given: dict[str, Any]) -> list[Tensor]:
    """The operands, by name, that an operator writes to."""
    if not function._schema.is_mutable:
        return []
    arguments = function._schema.arguments
    names = [a.name for a in arguments if a.alias_info and a.alias_info.is_write]
    return tensors_of([given.get(name) for name in names])


def tensors_of(*values: Any) -> list[Tensor]:
    """Every tensor in some values, once."""
    return list({id(t): t for t in tensors_in(values)}.values())


Rule = Callable[[Call], Sequence[Tensor | None]]
