"""What a feature map has for those who only read it: pictures, pages, tables, views, errors.

They lie below `map/`, which calls them, and so they name no `FeatureMap`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from typing_extensions import Self

from fmapkit.kinds import Kind
from fmapkit.torchlib.sharded import ends_of, is_dtensor


class ReadableMap(Protocol):
    """A tensor and its tags; `FeatureMap` says what each of them means."""

    @property
    def tensor(self) -> Tensor: ...

    @property
    def kind(self) -> Kind: ...

    @property
    def layer(self) -> str: ...

    @property
    def filter(self) -> int | None: ...

    @property
    def call(self) -> int: ...

    @property
    def step(self) -> int: ...

    @property
    def nonlinearity(self) -> str | None: ...

    @property
    def path(self) -> str: ...

    @property
    def filter_dim(self) -> int | None: ...

    @property
    def filters(self) -> range | tuple[int, ...] | None: ...

    @property
    def shape(self) -> torch.Size: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def weight(self) -> Tensor | None: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Self: ...

    def with_values(self, values: Tensor, filter_dim: int) -> Self: ...


AnyMap = TypeVar("AnyMap", bound=ReadableMap)


class ReadableMaps(Protocol):
    """The maps of a capture, to choose from."""

    @property
    def layers(self) -> list[str]:
        """The layers that have maps in the latest pass."""

    def select(self, layers: Any = None, *, step: int | None = None) -> Sequence[ReadableMap]:
        """The maps of some layers, of a pass."""


# In what torch finds no extremes.
_WIDER = {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.float64}


def plain_values(fm: ReadableMap) -> tuple[Tensor | None, str]:
    """The map's plain tensor; or None, and the reason why there are no values to speak of."""
    tensor = fm.tensor
    if is_dtensor(tensor):
        if not all(p.is_replicate() for p in tensor.placements):  # type: ignore[attr-defined]
            return None, "it is a DTensor, of which this rank has a part"
        tensor = ends_of(tensor)[-1]
    if tensor.is_complex():
        return None, "it is complex, and complex numbers have no order; analyse its abs()"
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        return None, "it is sparse, quantized or nested"
    if tensor.device.type == "meta":
        return None, "it is on the meta device, without values"
    if tensor.is_floating_point() and tensor.element_size() == 1:
        tensor = tensor.float()  # torch computes nothing in eight bits
    tensor = tensor.to(_WIDER.get(tensor.dtype, tensor.dtype))
    return tensor, ""


def tags(fm: ReadableMap) -> dict[str, Any]:
    """What an error about a map says of it, as data."""
    return {"layer": fm.layer, "kind": fm.kind, "call": fm.call, "step": fm.step}
