"""Inputs of other sizes, on which torch does another thing by the same code.

`contiguous` copies, or hands on what it is given; a reshape mixes filters with pixels, or there is
one pixel. No path tells. Each map is compared with one that was worked out by hand.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmapkit import CaptureWarning, capture
from fmapkit.missed import Reason
from fmapkit.storage import Aliases
from fmapkit.torchlib.memory import storage_of


def _add(y: Tensor) -> None:
    y += 1


def _add_data(y: Tensor) -> None:
    y.data.add_(1)


def _add_array(y: Tensor) -> None:
    array = y.detach().numpy()
    array += 1


def _add_shared(y: Tensor) -> None:
    array: Any = np.from_dlpack(y.detach())  # type: ignore[arg-type]
    torch.as_tensor(array).add_(1)


COPIES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "contiguous": lambda a, n: a[:, :n].contiguous(),
    "reshape": lambda a, n: a[:, :n].reshape(len(a) * n, -1),
    "flatten": lambda a, n: a[:, :n].flatten(1),
    "ravel": lambda a, n: a[:, :n].ravel(),
    "kept as a view": lambda a, n: a[:, :n].contiguous().view(-1)[1:],
}


class Trims(nn.Module):
    """Writes to what is a copy of the map, or the map itself where the texts are that long."""

    def __init__(self, copies: Callable[[Tensor, int], Tensor], write: Callable[[Tensor], None]):
        super().__init__()
        self.fc, self.copies, self.write = nn.Linear(4, 4), copies, write

    def forward(self, x: Tensor, n: int) -> Tensor:
        y = self.copies(F.relu(self.fc(x)), n)
        self.write(y)
        return y.clone()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("write", [_add, _add_data, _add_array, _add_shared])
@pytest.mark.parametrize("name", COPIES)
def test_a_copy_that_is_none_on_other_sizes(name: str, write: Any, mode: Any) -> None:
    if write is _add and mode is torch.enable_grad:
        pytest.skip("the model cannot do that either")
    model = Trims(COPIES[name], write)
    with capture(model) as maps, mode():
        for length, n in [(10, 8), (12, 9), (14, 8), (9, 9), (8, 8), (11, 7), (7, 7)]:
            x = torch.randn(2, length, 4)
            a = F.relu(F.linear(x, model.fc.weight, model.fc.bias)).detach()
            y = COPIES[name](a.clone(), n) + 1
            assert torch.equal(model(x, n), y)
            assert torch.equal(maps["fc"].tensor, a)
    assert not maps.missed


class Flat(nn.Module):
    """Its filters stay where there is one pixel."""

    def __init__(self, flat: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.flat = nn.Conv2d(3, 4, 4, stride=4), flat

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.flat(self.conv(x)))


@pytest.mark.parametrize(
    "flat",
    [
        lambda y: y.flatten(1),
        lambda y: y.reshape(len(y), -1),
        lambda y: y.view(y.shape[0], y[0].numel()),
    ],
)
@pytest.mark.parametrize("sizes", [(8, 12, 4, 16, 4, 20), (4, 4, 8, 12, 4), (8, 8, 4, 4)])
def test_filters_that_a_reshape_keeps_or_not(flat: Any, sizes: tuple[int, ...]) -> None:
    model = Flat(flat)
    with capture(model, kinds="activation") as maps, torch.no_grad():
        for n, size in enumerate(sizes):
            model(torch.randn(2 + n % 2, 3, size, size))
            (a,) = maps
            expected = ("conv", 1) if size == 4 else (":relu", None)
            assert (a.layer, a.filter_dim) == expected
    assert not maps.missed


def test_the_size_of_an_image_follows_a_flattened_map(traced: list[None]) -> None:
    """After two sizes, and the pass in which the lambda got its twin, no more is traced."""
    model = Flat(lambda y: y.flatten(1))
    with capture(model), torch.no_grad():
        for size in (8, 16, 24, 32, 40):
            model(torch.randn(2, 3, size, size))
    assert len(traced) <= 3


class Mixed(nn.Module):
    """Filters stay only where the second input has as many numbers as there are filters."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.relu(self.fc(x).reshape(-1, y.numel()))


def test_a_map_with_other_filters_than_the_plan_says_is_not_handed_out() -> None:
    model, others = Mixed(), [(2, 4), (4, 2), (2, 2), (2, 2), (8, 1)]
    labels = []
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", CaptureWarning)
        with capture(model, kinds="activation") as maps:
            for shape in others:
                model(torch.randn(2, 3, 8), torch.randn(shape))
                labels.append([(a.layer, a.filter_dim) for a in maps])
    fc, none = [("fc", 1)], [(":relu", None)]
    assert labels == [fc, fc, [], none, fc]
    assert [m.why for m in maps.missed] == [Reason.NEW_PATH]


def test_memory_of_a_copy_that_is_gone() -> None:
    """Another tensor may lie there: what is written to it says nothing of the copy."""
    aliases, x = Aliases(), torch.randn(4, 4).t()
    y = x.contiguous()
    aliases.note_copy(y, [x])
    view, place = y[1:], storage_of(y)
    del y
    aliases.wrote(view)
    assert aliases.copies_written
    aliases.begin_region()
    del view
    aliases.may_write(place)
    assert not aliases.copies_written
