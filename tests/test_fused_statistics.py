"""The compiled loops of `Statistics` and the calls of torch they stand for, against float64."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fmapkit import CaptureWarning, FeatureMap
from fmapkit.analysis import Statistics, _blocks, _of_map
from fmapkit.analysis._blocks import HIGH, LOW, S1, S2, SATURATED, ZEROS, Array

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OTHERS = (torch.int64, torch.uint8, torch.int16, torch.bool)
BOUNDS = (None, (-0.5, 0.5))

# Every way through the loops: rows along and across, of less than a vector and of several strips,
# narrow ones of which several are taken as one with some left over, and pieces of long rows.
SHAPES = [
    *[(1, 1, 1), (1, 7, 3), (7, 3, 1), (3, 5, 7), (100, 3, 1), (1003, 2, 1), (17, 64, 49)],
    *[(3, 64, 49), (2, 3, 200), (9, 1500, 1), (300, 40, 30), (1, 2, 70_000), (20, 1, 15)],
]


@pytest.fixture(scope="module")
def fused() -> ModuleType:
    pytest.importorskip("numba")
    from fmapkit.analysis import _fused

    return _fused


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values, in memory that has others between them, or several times the same."""
    others = x.flip(0, 1, 2)
    if layout == "every second":
        return torch.stack([x, others], -1)[..., 0]
    if layout in ("some filters", "some of a row"):
        dim = 1 if layout == "some filters" else 2
        return torch.cat([x, others], dim).narrow(dim, 0, x.shape[dim])
    if layout == "one for all":
        return x[:1, :1].expand(x.shape)
    return x


@st.composite
def maps(draw: st.DrawFn) -> Tensor:
    shape = draw(st.sampled_from(SHAPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = draw(st.sampled_from([x, x.relu(), -x.relu(), x.abs() + 1, -x.abs() - 1]))
    dtype = draw(st.sampled_from(FLOATS + OTHERS))
    for value in draw(st.lists(st.sampled_from([torch.nan, torch.inf, -torch.inf, -0.0]))):
        if dtype.is_floating_point or value == 0:
            x.view(-1)[draw(st.integers(0, x.numel() - 1))] = value
    layouts = ["as it is", "every second", "some filters", "some of a row", "one for all"]
    return laid_out(x.to(dtype), draw(st.sampled_from(layouts)))


def assert_found(found: Array, x: Tensor, pilot: Array, bounds: tuple[float, float] | None) -> None:
    wide = x.double().transpose(0, 1).flatten(1).numpy()
    with np.errstate(all="ignore"):
        less = wide - pilot[:, None]
        nan = np.isnan(wide).any(1)
        np.testing.assert_array_equal(np.isnan(found[S2]), nan)
        np.testing.assert_array_equal(found[LOW][~nan], wide.min(1)[~nan])
        np.testing.assert_array_equal(found[HIGH][~nan], wide.max(1)[~nan])
        np.testing.assert_array_equal(found[ZEROS], (wide == 0).sum(1))
        low, high = bounds or (-np.inf, np.inf)
        outside = (wide <= low) | (wide >= high) if bounds else np.zeros_like(wide)
        np.testing.assert_array_equal(found[SATURATED], outside.sum(1))
        for row, terms in ((S1, less), (S2, less * less)):
            true = terms.sum(1)
            np.testing.assert_array_equal(np.isfinite(found[row]), np.isfinite(true))
            np.testing.assert_array_equal(np.isinf(found[row]), np.isinf(true))
            # Each of up to 1024 additions in a row rounds by 2^-53, all the same way at worst.
            allowed = 1024 * 2.0**-53 * np.abs(terms).sum(1)
            assert not (np.abs(found[row] - true) > allowed).any()


@settings(max_examples=200)
@given(maps(), st.sampled_from([0.0, 0.25, 1e8]), st.sampled_from(BOUNDS))
def test_found_by_the_loops(
    fused: ModuleType, x: Tensor, pilot: float, bounds: tuple[float, float] | None
) -> None:
    shift = np.arange(x.shape[1]) + pilot
    assert_found(fused.sums(x, shift, bounds), x, shift, bounds)


@given(maps(), st.sampled_from([0.0, 0.25, 1e8]), st.sampled_from(BOUNDS))
def test_found_by_torch(x: Tensor, pilot: float, bounds: tuple[float, float] | None) -> None:
    shift = np.arange(x.shape[1]) + pilot
    assert_found(_blocks.sums(x, shift, bounds), x, shift, bounds)
    if x.is_floating_point():
        assert _blocks.nonfinite(x).tolist() == (~x.isfinite()).sum((0, 2)).tolist()


@pytest.mark.parametrize("copies", [1, 20], ids=["across", "along"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_sixteen_bits(fused: ModuleType, dtype: torch.dtype, copies: int) -> None:
    """Each is a filter of its own."""
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    x = numbers[None, :, None].expand(1, -1, copies).contiguous()
    wide = numbers.double().numpy()
    found = fused.sums(x, np.zeros(2**16), None)
    nan = np.isnan(wide)
    assert np.isnan(found[S2][nan]).all()
    for row in (LOW, HIGH):
        np.testing.assert_array_equal(found[row][~nan], wide[~nan])
    np.testing.assert_array_equal(found[S1][~nan], copies * wide[~nan])
    np.testing.assert_array_equal(found[ZEROS], copies * (wide == 0))


def test_a_pilot_is_taken_off_before_anything_is_summed_up(fused: ModuleType) -> None:
    """The other way round, float64 has no digits left at 1e15."""
    for shape in ((1, 1, 4000), (4000, 1, 1)):
        x = torch.full(shape, 1e15, dtype=torch.float64)
        x.view(-1)[::2] += 1
        s1, s2, *_ = fused.sums(x, np.array([1e15]), None)
        assert (s1, s2) == (2000, 2000)


def test_no_shape_is_compiled_for(fused: ModuleType) -> None:
    loops = fused._along, fused._across
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((2, 3, 200), (20, 3, 1)):
            fused.sums(torch.ones(shape, dtype=dtype), np.zeros(3), None)
    known = [len(loop.signatures) for loop in loops]
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES:
            x = torch.ones(shape, dtype=dtype)
            for some in (x, x.transpose(0, 1), x.transpose(1, 2), x.expand(2, *shape)[0]):
                fused.sums(some, np.zeros(some.shape[1]), None)
    assert [len(loop.signatures) for loop in loops] == known


# -- without numba, and with one that does not work ------------------------------------------------


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """As if nothing had been asked for yet."""
    monkeypatch.setattr(_of_map, "_given_up", [])
    _of_map._fused.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    _of_map._fused.cache_clear()


def mean_of(stats: Statistics, x: Tensor) -> list[float]:
    stats.update(FeatureMap(x, "activation", "conv", filter_dim=1, filters=range(x.shape[1])))
    return stats["conv"].mean.tolist()


X = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
SAID = (
    "numba is installed but does not work here, so Statistics go on without it, several times as "
    "slow ({})"
)


def test_without_numba_nothing_is_said(anew: pytest.MonkeyPatch) -> None:
    anew.setitem(sys.modules, "numba", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert mean_of(Statistics(), X) == [2, 4]
    assert _of_map._fused() is None


def assert_named_once(reason: str) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert [mean_of(Statistics(), X) for _ in range(2)] == [[2, 4]] * 2
    assert [(w.category, str(w.message)) for w in told] == [(CaptureWarning, SAID.format(reason))]


def test_a_numba_that_cannot_be_imported_is_named_once(anew: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    anew.setitem(sys.modules, "fmapkit.analysis._fused", None)
    assert_named_once(
        "ModuleNotFoundError: import of fmapkit.analysis._fused halted; None in sys.modules"
    )


def test_a_numba_that_cannot_compile_is_named_once(
    anew: pytest.MonkeyPatch, fused: ModuleType
) -> None:
    def fails(*args: object) -> Array:
        raise RuntimeError("LLVM ERROR: out of memory\nmore")

    anew.setattr(fused, "_across", fails)
    assert_named_once("RuntimeError: LLVM ERROR: out of memory")
