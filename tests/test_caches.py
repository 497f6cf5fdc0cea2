"""Caches that a call fills cost no pass: the next call is traced, and finds them filled."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fmapkit import capture
from tests.test_paths import Turn, hold, random, turns

_SCALES: dict[int, Tensor] = {}
_ready = False


@functools.lru_cache
def _scale(n: int) -> Tensor:
    found = torch.ones(n)
    return found * 2


def _global_scale(n: int) -> Tensor:
    if n not in _SCALES:
        _SCALES[n] = torch.ones(n) * 2
    return _SCALES[n]


def _once() -> None:
    global _ready
    if not _ready:
        torch.zeros(1).abs()
        _ready = True


class _Table:
    """An object of the model's own."""

    def __init__(self) -> None:
        self.rows: dict[int, Tensor] = {}


def _closing() -> Any:
    found: dict[int, Tensor] = {}

    def scale(n: int) -> Tensor:
        if n not in found:
            found[n] = torch.ones(n) * 2
        return found[n]

    return scale


class Caching(nn.Module):
    """It computes something once, and keeps it."""

    shared: dict[int, Tensor] = {}  # noqa: RUF012

    def __init__(self, by: str) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 1)
        self.by = by
        self.scales: dict[Any, Any] = {}
        self.table = _Table()
        self.closing = _closing()
        self.scale = torch.ones(0)
        self.register_buffer("row", torch.ones(0), persistent=False)

    @functools.cached_property
    def length(self) -> int:
        return torch.arange(3).numel()

    def scale_of(self, n: int) -> Tensor:
        scales = {
            "attribute": self.scales,
            "nested": self.scales.setdefault("inner", {}),
            "object": self.table.rows,
            "class": Caching.shared,
        }[self.by]
        if n not in scales:
            scales[n] = torch.ones(n) * 2
        return scales[n]

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[-1]
        if self.by == "lru":
            scale = _scale(n)
        elif self.by == "global":
            scale = _global_scale(n)
        elif self.by == "closure":
            scale = self.closing(n)
        elif self.by == "flag":
            _once()
            scale = x.new_ones(n)
        elif self.by == "property":
            scale = x.new_ones(n) * self.length
        elif self.by == "tensor":
            if self.scale.shape[0] < n:
                self.scale = torch.ones(n) * 2
            scale = self.scale[:n]
        elif self.by == "buffer":
            if self.row.shape[0] < n:
                self.row = torch.ones(n) * 2
            scale = self.row[:n]
        else:
            scale = self.scale_of(n)
        return torch.relu(self.conv(x) * scale)


_BY = [
    *("attribute", "nested", "object", "class", "lru", "global", "closure", "flag", "property"),
    *("tensor", "buffer"),
]


def _forget() -> None:
    global _ready
    _ready = False
    _SCALES.clear()
    _scale.cache_clear()
    Caching.shared.clear()


@pytest.mark.parametrize("by", _BY)
def test_a_cache_that_is_filled_costs_no_pass(by: str) -> None:
    """Neither where its code has run before, in another model, nor at another size."""
    shapes = [(2, 3, 5)] * 4 + [(2, 3, 7)] * 4
    for _ in range(2):
        _forget()
        model = Caching(by)
        with torch.no_grad(), capture(model) as maps:
            for n, shape in enumerate(shapes):
                out = model(random(*shape, n=n))
                assert torch.equal(maps["conv"].tensor, out)
                assert len(maps) == 2
            assert not maps.missed


@pytest.mark.parametrize("by", _BY)
def test_a_cache_leaves_maps_as_they_are(by: str) -> None:
    _forget()
    passes: list[Turn] = turns(*[(2, 3, 5)] * 4, *[(2, 3, 7)] * 4)
    assert not hold(Caching(by), passes).missed


class Growing(nn.Module):
    """It keeps a number of each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 1)
        self.steps: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.steps.append(0)
        return torch.relu(self.conv(x))


def test_a_list_of_numbers_is_no_cache(traced: list[None]) -> None:
    with torch.no_grad(), capture(model := Growing()):
        for _ in range(6):
            model(torch.randn(2, 3, 5))
    assert len(traced) == 1
