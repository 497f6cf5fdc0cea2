"""What a store of features says about itself: the arrays in it, and the call that made it.

All of it is plain JSON in the attributes of the store's root; see `docs/data-format.md`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar
from urllib.parse import quote

import numpy as np
import torch

FORMAT = 2
_MODEL = "%model"  # the name of the model itself, which is empty; `quote` never gives this
# Types that NumPy and Zarr lack are stored as the bits that they are.
_AS_BITS = {
    "bfloat16": "uint16",
    "float8_e4m3fn": "uint8",
    "float8_e5m2": "uint8",
    "float8_e4m3fnuz": "uint8",
    "float8_e5m2fnuz": "uint8",
}


def torch_dtype(name: str) -> torch.dtype:
    """The torch type of a name such as "bfloat16"."""
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


def as_stored(values: torch.Tensor) -> np.ndarray[Any, Any]:
    """The memory of a tensor on the CPU, as NumPy has it: of a type that it lacks, the bits."""
    bits = _AS_BITS.get(str(values.dtype).removeprefix("torch."))
    if bits is not None:
        values = values.contiguous().view(torch_dtype(bits))
    return values.numpy()


_T = TypeVar("_T")


def from_json(kind: type[_T], given: Mapping[str, Any]) -> _T:
    """What JSON has kept of one of these, whose lists were tuples."""
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """One kind of map of one layer."""

    layer: str  # name of the layer; "" is the model itself
    kind: str  # one of the five kinds
    call: int  # which call of the layer
    path: str  # place in a nested output
    nonlinearity: str | None  # σ, or None
    nth: int  # which map of that layer, kind, call and path in a pass: two σ on one layer give two
    per: Literal["sample", "token"]  # whether a row is of one sample, or of one token
    shape: tuple[int, ...]  # of a row
    dtype: str  # torch's name of the values' type
    filter_axis: int | None  # axis of the array that counts filters, where the rows are axis 0
    filters: tuple[int, ...] | None  # the filters that lie along it; None for all of them

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells the maps of a pass apart."""
        return (self.layer, self.kind, self.call, self.path, self.nonlinearity, self.nth)

    @property
    def name(self) -> str:
        """What it is called, and where it lies below `layers/`."""
        base = quote(self.layer, safe="[]:") if self.layer else _MODEL
        if base.startswith("__"):  # which Zarr keeps for itself
            base = "%5F" + base[1:]
        parts = [self.kind]
        parts += [quote(self.path, safe="[]'")] if self.path else []
        parts += [f"call{self.call}"] if self.call else []
        parts += [f"nth{self.nth}"] if self.nth else []
        return f"{base}/{'-'.join(parts)}"

    @property
    def node(self) -> str:
        """Where it lies in the store."""
        return f"layers/{self.name}"

    @property
    def stored(self) -> np.dtype[Any]:
        """The NumPy type in which it is stored."""
        return np.dtype(_AS_BITS.get(self.dtype, self.dtype))

    @property
    def row_bytes(self) -> int:
        """Bytes of one row as it is stored, before compression."""
        return math.prod(self.shape) * self.stored.itemsize

    @property
    def dimensions(self) -> tuple[str, ...]:
        """Names of the axes, for those who read the store with Zarr or xarray."""
        names = ["samples" if self.per == "sample" else "tokens"]
        names += [
            "filters" if axis == self.filter_axis else f"axis{axis}"
            for axis in range(1, 1 + len(self.shape))
        ]
        return tuple(names)

    @property
    def said(self) -> str:
        """For messages."""
        more = [f"call {self.call}"] if self.call else []
        more += [f"path {self.path!r}"] if self.path else []
        more += [f"number {self.nth}"] if self.nth else []
        return f"the {self.kind} of layer {self.layer!r}" + (
            f" ({', '.join(more)})" if more else ""
        )


@dataclass(frozen=True, slots=True)
class FieldSpec:
    """Something of a batch that is kept beside the features."""

    name: str
    per: Literal["sample", "token"]  # whether a row is of one sample, or of one token
    shape: tuple[int, ...]  # of a row
    dtype: str  # NumPy's name of the type; "string" for text

    @property
    def node(self) -> str:
        return f"fields/{quote(self.name, safe='')}"

    @property
    def text(self) -> bool:
        return self.dtype == "string"

    @property
    def stored(self) -> np.dtype[Any]:
        """The type of its values in memory; that of text is `object`."""
        return np.dtype(object if self.text else self.dtype)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row as it is stored; of text, a guess."""
        return 64 if self.text else math.prod(self.shape) * self.stored.itemsize

    @property
    def dimensions(self) -> tuple[str, ...]:
        """Names of the axes, as of an array."""
        rows = "samples" if self.per == "sample" else "tokens"
        return (rows, *(f"axis{axis}" for axis in range(1, 1 + len(self.shape))))


Spec = ArraySpec | FieldSpec


@dataclass(frozen=True, slots=True)
class UnitRecord:
    """What is known of a unit once it is in the store: some batches in a row."""

    unit: int  # its number; unit u is of the batches u * n to (u + 1) * n - 1
    start: int  # number of its first sample in the data set
    samples: int
    rows: int  # how many rows arrays of tokens have of it; else the same as `samples`
    batches: int
    digest: str  # of what the loader gave as its first batch
    run: str = ""  # which run wrote it, where running analyses ride along
    absorbed: tuple[str, ...] = ()  # runs before that one, whose analyses it went on with


@dataclass(frozen=True, slots=True)
class Manifest:
    """What the root of a store says."""

    arrays: tuple[ArraySpec, ...]  # in the order of execution
    fields: tuple[FieldSpec, ...]  # what is kept beside
    batches_per_unit: int  # how many batches are written and committed together
    batch_size: int | None  # samples of each batch but the last, where the loader says so
    samples: int | None  # of the data set, where the loader says so
    asked: Mapping[str, Any]  # the call, described; another one is refused
    first: str  # digest of the first batch
    versions: Mapping[str, str] = field(default_factory=dict)  # of what made it
    complete: bool = False  # whether the data set is all there

    @property
    def specs(self) -> list[Spec]:
        return [*self.arrays, *self.fields]

    @property
    def regular(self) -> bool:
        """Whether every unit has the same number of rows, so that each array is one Zarr array."""
        each = all(spec.per == "sample" for spec in self.specs)
        return each and self.batch_size is not None and self.samples is not None

    @property
    def rows_per_unit(self) -> int:
        """Of a regular store: rows of each unit but the last."""
        assert self.batch_size is not None
        return self.batches_per_unit * self.batch_size

    def ends_unit(self, batch: int) -> bool:
        """Whether the batch of that number is the last one of a unit."""
        return (batch + 1) % self.batches_per_unit == 0

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "layout": "regular" if self.regular else "ragged",
            **asdict(self),
        }

    @staticmethod
    def of(given: Mapping[str, Any]) -> Manifest:
        """What JSON has kept."""
        rest = {k: v for k, v in given.items() if k not in ("format", "layout", "arrays", "fields")}
        return Manifest(
            arrays=tuple(from_json(ArraySpec, array) for array in given["arrays"]),
            fields=tuple(from_json(FieldSpec, field) for field in given["fields"]),
            **rest,
        )
