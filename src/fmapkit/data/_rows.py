"""From the maps of a pass to the rows that are stored: pooled, unpadded, in the dtype asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fmapkit import FeatureMap
from fmapkit._warnings import warn
from fmapkit.data._batches import first_size
from fmapkit.data._manifest import ArraySpec, FieldSpec, Spec
from fmapkit.errors import ArgumentError, DistributedError, StoreError, listed
from fmapkit.map import checked_mask, kept, positions_first

Pool = Literal["mean", "max"] | Callable[[FeatureMap], Tensor]
Mask = str | Callable[[Any], Tensor]
Keep = str | Iterable[str] | Mapping[str, Any]

_POOLS = ("mean", "max")
_TOKEN_FIELDS = ("sample", "position")


@dataclass(frozen=True, slots=True)
class Taken:
    """What one batch gives to the store."""

    arrays: list[tuple[ArraySpec, Tensor]]  # each with its rows, still where the model made them
    fields: list[tuple[FieldSpec, Any]]  # each with its values, one row for each sample or token
    samples: int
    rows: int  # how many rows arrays of tokens got
    mask: Tensor | None  # which positions are no padding


class Rows:
    """Makes rows of maps, the same way for every batch; arguments as in `extract`."""

    def __init__(
        self, pool: Pool | None, mask: Mask | None, dtype: torch.dtype | None, keep: Keep
    ) -> None:
        if pool is not None and not callable(pool) and pool not in _POOLS:
            raise ArgumentError(
                f"pool must be one of {_POOLS}, or a function of a map, not {pool!r}"
            )
        self._pool = pool
        self._mask = mask
        self._dtype = dtype
        self._narrowed: dict[ArraySpec, str] = {}  # what is stored in a type of less range
        self.keep = _named(keep)  # name -> key, index or function of the batch
        if self.tokens and (taken := [name for name in _TOKEN_FIELDS if name in self.keep]):
            raise ArgumentError(
                f"keep= names a field {taken[0]!r}, which is what mask= calls the sample and the "
                "position of each token; give yours another name: keep={'my_name': key}"
            )

    @property
    def tokens(self) -> bool:
        """Whether a row may be of one token."""
        return self._mask is not None and self._pool is None

    def _mask_of(self, data: Any) -> Tensor | None:
        """The mask of a batch, (samples, positions), boolean."""
        if self._mask is None:
            return None
        mask = self._mask(data) if callable(self._mask) else _field(data, self._mask, "mask=")
        return checked_mask(mask, f"mask={self._mask!r} must give a tensor")

    def take(self, maps: Iterable[FeatureMap], data: Any, start: int) -> Taken:
        """The rows of one batch; an error where a map has none that go with its samples."""
        mask = self._mask_of(data)
        samples = first_size(data)
        if mask is not None and len(mask) != samples:
            raise ArgumentError(
                f"mask={self._mask!r} is of {len(mask)} samples, and the batch has {samples}"
            )
        count = int(mask.sum()) if mask is not None and self.tokens else samples
        counted: dict[tuple[Any, ...], int] = {}
        arrays = []
        for fm in maps:
            place = (fm.layer, fm.kind, fm.call, fm.path)
            nth = counted[place] = counted.get(place, -1) + 1
            arrays.append(self._array(fm, nth, mask, samples))
        return Taken(arrays, self._fields(data, mask, samples, start), samples, count, mask)

    # -- maps -----------------------------------------------------------------------------------

    def _array(
        self, fm: FeatureMap, nth: int, mask: Tensor | None, samples: int
    ) -> tuple[ArraySpec, Tensor]:
        said = f"the {fm.kind} of layer {fm.layer!r}"
        per: Literal["sample", "token"] = "sample"
        tensor = fm.tensor
        axis = None if fm.filter_dim is None else fm.filter_dim % tensor.dim()
        if fm.parts is not None or hasattr(tensor, "to_local"):
            raise DistributedError(
                f"{said} is one rank's part of a map, or a DTensor; extract takes features of "
                "models that are whole on each rank"
            )
        tensor, axis = positions_first(tensor, axis, mask)
        sequence = mask is not None and self._of_tokens(tensor, axis, mask, said)
        if callable(self._pool):
            tensor, axis = _called(self._pool, fm, said), None
        elif self._pool is not None:
            tensor, axis = _pooled(tensor, axis, self._pool, mask if sequence else None, said)
        elif sequence:
            assert mask is not None
            tensor, per = kept(tensor, mask), "token"
            axis = None if axis is None else axis - 1
        if per == "sample" and (not tensor.dim() or tensor.shape[0] != samples):
            raise ArgumentError(
                f"{said} has shape {tuple(fm.shape)}, and the batch has {samples} samples: its "
                "first axis does not count them; say with pool=function(fm) what the row of each "
                "sample is"
            )
        given = tensor.dtype
        if self._dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(self._dtype)
        filters = None
        if axis is not None and fm.filters is not None and fm.filters != range(len(fm.filters)):
            filters = tuple(fm.filters)
        spec = ArraySpec(
            layer=fm.layer,
            kind=fm.kind,
            call=fm.call,
            path=fm.path,
            nonlinearity=fm.nonlinearity,
            nth=nth,
            per=per,
            shape=tuple(tensor.shape[1:]),
            dtype=str(tensor.dtype).removeprefix("torch."),
            filter_axis=axis,
            filters=filters,
        )
        if tensor.is_floating_point() and _largest(tensor.dtype) < _largest(given):
            self._narrowed.setdefault(spec, said)
        return spec, tensor

    def warn_of_overflow(self, taken: Taken) -> None:
        """Warn, once of each array, of values that its type may not hold; of rows on the host."""
        for spec, rows in taken.arrays:
            if not (said := self._narrowed.get(spec, "")) or not rows.numel():
                continue
            wide = rows if rows.element_size() > 1 else rows.float()
            if torch.stack((wide.amin(), wide.amax())).isfinite().all():
                continue
            self._narrowed[spec] = ""
            warn(
                f"{said} has a NaN or an infinite value in {spec.dtype}, which holds values up to "
                f"{_largest(rows.dtype):g}: dtype=torch.bfloat16 has the range of float32"
            )

    def _of_tokens(self, tensor: Tensor, axis: int | None, mask: Tensor, said: str) -> bool:
        """Whether axes 0 and 1 of a map are the samples and positions of the mask."""
        if tensor.shape[:2] != mask.shape or axis == 1 or tensor.dim() < 2:
            return False
        if tensor.dim() == 2 and axis is None and not callable(self._pool):
            raise ArgumentError(
                f"{said} has the shape of the mask, {tuple(mask.shape)}, and nobody knows whether "
                "its second axis counts positions or features; say it with pool=function(fm)"
            )
        return True

    # -- fields -----------------------------------------------------------------------------------

    def _fields(
        self, data: Any, mask: Tensor | None, samples: int, start: int
    ) -> list[tuple[FieldSpec, Any]]:
        found = []
        if mask is not None and self.tokens:
            at = mask.nonzero().cpu()
            for name, values in zip(_TOKEN_FIELDS, (at[:, 0] + start, at[:, 1]), strict=True):
                found.append((FieldSpec(name, "token", (), "int64"), values.numpy()))
        for name, where in self.keep.items():
            value = where(data) if callable(where) else _field(data, where, f"keep={name!r}")
            per: Literal["sample", "token"] = "sample"
            if isinstance(value, Tensor):
                value = value.detach()
                if mask is not None and self.tokens and value.shape[:2] == mask.shape:
                    value, per = kept(value, mask), "token"
                value = value.cpu()
                value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
            array = np.asarray(value)
            text = array.dtype.kind in "UTO" and all(isinstance(v, str) for v in array.flat)
            if (array.dtype.hasobject and not text) or array.dtype.kind in "SMmV":
                raise ArgumentError(
                    f"keep={name!r} gives values of type {array.dtype}: numbers and text can be "
                    "kept beside features"
                )
            if per == "sample" and (not array.ndim or len(array) != samples):
                raise ArgumentError(
                    f"keep={name!r} gives values of shape {array.shape}, and the batch has "
                    f"{samples} samples: one for each is needed"
                )
            if text:
                array = array.astype(object)
            dtype = "string" if text else str(array.dtype)
            found.append((FieldSpec(name, per, array.shape[1:], dtype), array))
        return found


def _named(keep: Keep) -> dict[str, Any]:
    """What is kept beside the features: name -> key, index or function of the batch."""
    if isinstance(keep, str):
        keep = (keep,)
    named: dict[str, Any] = dict(keep) if isinstance(keep, Mapping) else {n: n for n in keep}
    for name, where in named.items():
        if not isinstance(name, str) or not name:
            raise ArgumentError(f"keep= names fields by strings, not {name!r}")
        if isinstance(where, bool) or not (isinstance(where, (str, int)) or callable(where)):
            raise ArgumentError(
                f"keep={{{name!r}: ...}} must be a key of the batch, an index into it, or a "
                f"function of it, not {where!r}"
            )
    return named


def _largest(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).max if dtype.is_floating_point else 0.0


def _called(pool: Callable[[FeatureMap], Tensor], fm: FeatureMap, said: str) -> Tensor:
    found = pool(fm)
    if not isinstance(found, Tensor):
        raise ArgumentError(
            f"pool= gave {type(found).__name__} for {said}: a tensor with a row for each sample "
            "is needed"
        )
    return found.detach()


def _pooled(
    tensor: Tensor, axis: int | None, pool: str, mask: Tensor | None, said: str
) -> tuple[Tensor, int | None]:
    """Over all axes but those of samples and filters; where there is a mask, over what it keeps."""
    if axis is None and mask is None and tensor.dim() > 2:
        raise ArgumentError(
            f"{said} has shape {tuple(tensor.shape)} and no filter axis, so what to pool over is "
            "not known; give pool=function(fm)"
        )
    if axis == 0:
        raise ArgumentError(f"{said} has its filters on axis 0: it was not made of a batch")
    if axis is not None:
        over = [d for d in range(1, tensor.dim()) if d != axis]
    else:
        over = [1] if mask is not None else []
    if not over:
        return tensor, axis
    if not tensor.is_floating_point():
        raise ArgumentError(f"{said} is of type {tensor.dtype}, which has no {pool}")
    if mask is None:
        found = tensor.mean(over) if pool == "mean" else tensor.amax(over)
    else:
        if not bool(mask.any(1).all()):
            raise ArgumentError(
                f"mask= keeps no position of sample {int(mask.any(1).int().argmin())} of a batch, "
                f"of which {said} has no {pool}; leave such samples out of the data, or pool with "
                "a function"
            )
        keep = mask.to(tensor.device).reshape(*mask.shape, *[1] * (tensor.dim() - 2))
        if pool == "mean":
            wide = torch.promote_types(tensor.dtype, torch.float32)
            total = torch.where(keep, tensor, 0).sum(over, dtype=wide)
            positions = mask.to(tensor.device).sum(1) * prod(tensor.shape[d] for d in over if d > 1)
            found = (total / positions.reshape(-1, *[1] * (total.dim() - 1))).to(tensor.dtype)
        else:
            found = torch.where(keep, tensor, -torch.inf).amax(over)
    return found, None if axis is None else 1


def _field(data: Any, key: Any, asked: str) -> Any:
    """An entry of a batch, by key, index or attribute."""
    if isinstance(data, Mapping):
        if key in data:
            return data[key]
        raise ArgumentError(
            f"{asked}: the batch has no {key!r}; it has {listed(map(str, data))}",
            candidates=map(str, data),
        )
    if isinstance(key, int) and isinstance(data, (list, tuple)):
        if -len(data) <= key < len(data):
            return data[key]
        raise ArgumentError(f"{asked}: the batch has {len(data)} entries, and none is at {key}")
    if isinstance(key, str) and hasattr(data, key):
        return getattr(data, key)
    raise ArgumentError(
        f"{asked}: a batch of type {type(data).__name__} has no {key!r}; name an entry by its "
        "index, keep={'label': 1}, or give a function of the batch"
    )


def check_same(taken: Taken, arrays: Iterable[ArraySpec], fields: Iterable[FieldSpec]) -> None:
    """Refuse a batch that gave other maps than the first one."""
    known = {spec.key: spec for spec in arrays}
    given = {spec.key: spec for spec, _ in taken.arrays}
    for key, spec in known.items():
        if key not in given:
            raise StoreError(
                f"{spec.said} is missing in a batch, and the first one gave it; the layers of a "
                "store are those that every batch runs"
            )
        if spec != given[key]:
            raise StoreError(_other(spec.said, spec, given[key]))
    for key, spec in given.items():
        if key not in known:
            raise StoreError(
                f"a batch gave {spec.said}, and the first one did not; the layers of a store are "
                "those that every batch runs"
            )
    for field, (now, _) in zip(fields, taken.fields, strict=True):
        if field != now:
            raise StoreError(_other(f"the field {field.name!r}", field, now))


def _other(said: str, then: Spec, now: Spec) -> str:
    hint = ""
    if then.shape != now.shape:
        hint = "; where inputs differ in size, pool=... makes rows of one shape, and of sequences "
        hint += "mask=... makes a row of each token"
    return (
        f"{said} has rows of shape {then.shape} and type {then.dtype} in the first batch, and "
        f"{now.shape} and {now.dtype} in a later one{hint}"
    )
