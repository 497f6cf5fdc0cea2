"""Whole numbers of a path that follow the sizes of the inputs, by a rule that rounds."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fmapkit import capture
from fmapkit.paths.number_rules import are_clear, coincidences, kept, roundings, rules_of
from tests.test_paths import hold, turns

pytestmark = pytest.mark.filterwarnings("ignore::fmapkit.CaptureWarning")

_DIVISORS = [2, 3, 4, 5, 7, 8, 14, 16, 20, 28, 32, 64, 320]


@given(
    st.sampled_from(_DIVISORS),
    st.integers(-1, 1),
    st.lists(st.integers(10, 4000), min_size=3, max_size=12, unique=True),
)
def test_a_rule_that_rounds_is_found_and_kept(c: int, more: int, sizes: list[int]) -> None:
    seen = [((size + more * (c // 2)) // c, (3, size)) for size in sizes]
    rules = roundings(seen[:2])
    if min(value for value, _ in seen[:2]) < 5:
        assert not rules
        return
    assert any(rule[1:3] == (1, c) for rule in rules)
    for value, size in seen[2:]:
        if are_clear(rules, size):  # whoever goes by it goes by the true number
            _, at, by, least, _ = next(iter(rules))
            assert (size[at] + least) // by == value
        rules = kept(rules, value, size)
        assert any(rule[1:3] == (1, c) for rule in rules)


def test_small_numbers_are_taken_for_dimensions_and_indices() -> None:
    assert not roundings([(4, (40,)), (8, (80,))])
    assert not roundings([(8, (80,)), (4, (40,))])
    assert roundings([(8, (83,)), (5, (51,))])


def test_what_no_size_is_divided_to_is_constant() -> None:
    """64 channels of 224 and of 256 pixels; but 7 rows of 224 and of 227 may follow."""
    assert not coincidences(64, [(1, 224), (1, 256)])
    assert ("same", 7) in coincidences(7, [(1, 224), (1, 227)])
    assert not are_clear(coincidences(7, [(1, 224), (1, 227)]), (1, 300))


def test_exact_rules_come_first() -> None:
    assert rules_of(12, (2, 6)) & rules_of(16, (2, 8)) == {
        *(("times", 1, 2), ("product", 0, 1, 1)),
    }


class Shuffled(nn.Module):
    """Channels change places: rows and columns stand in the code, divided by strides."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=4, padding=1)
        self.body = nn.Conv2d(4, 4, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.stem, self.body):
            x = torch.relu(layer(x))
            b, c, h, w = x.shape
            x = x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        return x


def test_odd_sizes_are_traced_ever_more_seldom(traced: list[None]) -> None:
    draw = random.Random(3)
    with torch.no_grad(), capture(model := Shuffled().eval()) as maps:
        counts = []
        for _ in range(6):
            del traced[:]
            for _ in range(10):
                model(torch.randn(1, 3, draw.randint(60, 160), draw.randint(60, 160)))
                assert len(maps) == 4
            counts.append(len(traced))
    assert not maps.missed
    assert counts[0] > counts[-1]
    assert sum(counts[3:]) <= 9


def test_maps_of_odd_sizes() -> None:
    draw = random.Random(5)
    shapes = [(1, 3, draw.randint(60, 100), draw.randint(60, 100)) for _ in range(24)]
    assert not hold(Shuffled(), turns(*shapes)).missed


class Chosen(nn.Module):
    """Which layer is taken is hidden: a number of 5 and more, which follows nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv1d(3, 4, 1) for _ in range(12))
        self.hidden = {"at": 6}

    def forward(self, x: Tensor) -> Tensor:
        at = self.hidden["at"]
        return torch.relu([layer(x) for layer in self.layers][at].view(x.shape[0], 4, -1))


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_hidden_number_is_no_rounded_size(step: int) -> None:
    """It changes where the size does, just as a rounded size would, and back."""

    def change(n: int) -> int:
        return 6 + n // step % 6

    passes = []
    for n, size in enumerate([60, 64, 70, 66, 80, 72, 90, 61, 83, 77, 68, 95]):
        passes += turns((2, 3, size), before=lambda model, n=n: model.hidden.update(at=change(n)))
    hold(Chosen(), passes, most=len(passes))
