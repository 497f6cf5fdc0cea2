"""What a feature map has for those who only read it: pictures, pages, tables, views, errors.

They lie below `map.py`, which calls them, and so they name no `FeatureMap`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from typing_extensions import Self

from fmapkit.kinds import Kind

__all__ = ["AnyMap", "ReadableMap", "ReadableMaps"]


class ReadableMap(Protocol):
    """A tensor and its tags; `FeatureMap` says what each of them means."""

    @property
    def tensor(self) -> Tensor:
        """The values."""

    @property
    def kind(self) -> Kind:
        """What the map is."""

    @property
    def layer(self) -> str:
        """Whose filters made it."""

    @property
    def filter(self) -> int | None:
        """Of which filter alone it is."""

    @property
    def call(self) -> int:
        """Which call of the layer."""

    @property
    def step(self) -> int:
        """Which pass."""

    @property
    def nonlinearity(self) -> str | None:
        """The name of σ."""

    @property
    def path(self) -> str:
        """Place in a nested output."""

    @property
    def filter_dim(self) -> int | None:
        """Axis of the filters."""

    @property
    def filters(self) -> range | tuple[int, ...] | None:
        """The filters along it."""

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of the values."""

    @property
    def device(self) -> torch.device:
        """Where the values are."""

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""

    @property
    def weight(self) -> Tensor | None:
        """The weights of the filters."""

    def __len__(self) -> int:
        """Number of filters held."""

    def __getitem__(self, index: int) -> Self:
        """The map of one filter."""

    def with_values(self, values: Tensor, filter_dim: int) -> Self:
        """The same tags with other values."""


AnyMap = TypeVar("AnyMap", bound=ReadableMap)


class ReadableMaps(Protocol):
    """The maps of a capture, to choose from."""

    @property
    def layers(self) -> list[str]:
        """The layers that have maps in the latest pass."""

    def select(self, layers: Any = None, *, step: int | None = None) -> Sequence[ReadableMap]:
        """The maps of some layers, of a pass."""
